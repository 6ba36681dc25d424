"""Call the platform as somebody who submits tasks and administers it: calls, waits, and what goes into them."""
