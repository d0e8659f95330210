"""The command-line app's commands. Each command has its own module."""
