"""The web page at /: a chat, and a reader of uploaded files."""
