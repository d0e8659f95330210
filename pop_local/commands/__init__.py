"""The command-line app's commands, one module each."""
