"""Requests to other agents, and events."""
