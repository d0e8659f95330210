"""Child processes with time and memory limits, for handling untrusted input."""
