"""Who is on the mesh: contracts, instances, liveness."""
