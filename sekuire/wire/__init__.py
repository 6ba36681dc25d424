"""Define what travels between a client and the platform: paths, events, bodies, answers. Pure; no I/O."""
