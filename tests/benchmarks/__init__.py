"""How fast the house is, against bare NATS and against the published SDK: `python -m tests.benchmarks`."""
