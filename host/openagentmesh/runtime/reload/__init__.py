"""From a saved file to the version that serves."""
