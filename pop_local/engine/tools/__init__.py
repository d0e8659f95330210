"""Tools: their description in prompts, the form of calls, and parsing of calls in answers."""
