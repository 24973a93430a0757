"""Programs that run with both SDKs, unchanged: a caller, providers of agents, and a replica."""
