"""Settings, and the program's folders."""
