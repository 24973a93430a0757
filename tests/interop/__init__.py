"""The published SDK and ours on one mesh, each as caller and as provider of the other."""
