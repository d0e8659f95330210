"""The work of commands as library calls."""
