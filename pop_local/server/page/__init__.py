"""The web page at /, with a chat and a reader of uploaded files."""
