"""Child processes that handle untrusted input under time and memory limits."""
