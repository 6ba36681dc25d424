"""What travels between the library and the platform. Pure: no module here does I/O."""
