"""What an author declares: an agent with its handler, types, sources and limits."""
