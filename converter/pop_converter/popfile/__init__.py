"""Plan conversions, and read and write POP files."""
