"""What the benchmarks start: each of these files is one process, and talks in JSON lines."""
