"""How results are shown: tables and words."""
