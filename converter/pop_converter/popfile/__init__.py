"""The POP format, plans, and the streaming rewrite."""
