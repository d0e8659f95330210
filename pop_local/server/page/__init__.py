"""The page at /: one chat in a browser, and the files that are dropped on it."""
