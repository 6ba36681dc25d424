"""Nothing is lost and nothing runs twice: the worker and the local platform under faults and kills."""
