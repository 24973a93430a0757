"""The published SDK and ours on one mesh, each as caller and as provider for the other one."""
