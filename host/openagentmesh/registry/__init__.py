"""What is on the mesh: contracts, instances, liveness."""
