"""Tools: describe them in prompts, constrain the form of calls, and parse calls in answers."""
