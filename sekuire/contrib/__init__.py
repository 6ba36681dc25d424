"""Connect the library to other projects. Each module needs an extra of its own and is imported by name."""
