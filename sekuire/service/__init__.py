"""Run a worker as a process of the operating system: signals, reloads, exit codes, command-line arguments."""
