"""The web page at /, which offers a chat and reads uploaded files."""
