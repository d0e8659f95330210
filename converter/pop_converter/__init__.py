"""The POP file format and everything that writes it. Knows no terminal and no chat."""
