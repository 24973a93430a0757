"""The host: config, modules, one node."""
