"""What runs on either SDK, unchanged: one that asks, one that serves, one that is a replica."""
