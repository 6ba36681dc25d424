"""Share building blocks between packages. Nothing in here is public."""
