"""The work of commands as library calls: convert, evaluate, bench, and their shared parts."""
