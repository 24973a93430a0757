"""Being on the mesh."""
