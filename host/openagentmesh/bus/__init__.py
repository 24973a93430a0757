"""The one NATS connection."""
