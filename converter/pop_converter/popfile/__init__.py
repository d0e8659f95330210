"""POP files: their format, conversion plans, and writers."""
