"""Building blocks that two or more packages of the library share."""
