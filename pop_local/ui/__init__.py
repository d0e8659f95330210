"""All that draws on the terminal."""
