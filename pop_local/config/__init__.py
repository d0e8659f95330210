"""Settings, and the folders that the program keeps things in."""
