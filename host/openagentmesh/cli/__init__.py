"""The command `oam`."""
