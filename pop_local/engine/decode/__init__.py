"""Sample an answer's tokens, enforce grammars, compute log probabilities, and decode the text."""
