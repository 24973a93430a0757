"""What travels between participants: pure data, no input or output."""
