"""Keep one installation logged in and alive."""
