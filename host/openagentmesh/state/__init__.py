"""What all participants share: keys, files, log levels."""
