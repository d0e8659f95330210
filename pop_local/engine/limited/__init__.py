"""Work that may take all time and memory, in a child process with limits on both."""
