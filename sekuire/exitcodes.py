"""The exit codes of every command: fine; failed; wrong usage or configuration; interrupted."""

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
