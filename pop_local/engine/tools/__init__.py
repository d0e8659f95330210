"""Describe tools in prompts, constrain the format of tool calls, and parse calls in answers."""
