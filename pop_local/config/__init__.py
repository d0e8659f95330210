"""Read settings and locate the program's folders."""
