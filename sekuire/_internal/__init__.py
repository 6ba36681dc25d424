"""Building blocks that several packages use. Nothing here is public."""
