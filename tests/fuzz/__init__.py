"""A fuzz target for every decoder that reads bytes from the network or from a file: ``tox -e fuzz``."""
