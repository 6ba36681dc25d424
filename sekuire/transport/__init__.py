"""Make HTTP calls and read streams, within limits of time and size; another thread can end a stream at once."""
