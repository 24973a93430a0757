"""What a plugin may implement, and the manager that calls it."""
