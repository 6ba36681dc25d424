"""HTTP as this library needs it: bounded, without surprises, and wakeable."""
