"""What a task costs, measured beside what a plain POST costs, in one run: ``python -m benchmarks``."""
