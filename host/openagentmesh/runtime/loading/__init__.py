"""From a folder or package to a module with its agents."""
