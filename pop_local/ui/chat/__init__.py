"""An interactive chat in the terminal."""
