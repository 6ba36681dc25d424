"""Many threads at once, switched as often as the interpreter can; and every stop from every state."""
