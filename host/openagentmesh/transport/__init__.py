"""The one NATS connection, and what is built directly on it: replies, KV, objects, the embedded server."""
