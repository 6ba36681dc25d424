"""A worker under load for a set time: what it holds at the end against what it held at the start."""
