"""Describe tools in prompts, constrain the form of tool calls, and parse calls in answers."""
