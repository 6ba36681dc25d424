"""Thin bridges to other projects; each needs an extra of its own and is imported by name."""
