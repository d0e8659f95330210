"""Decoding: sampling under grammars, log probabilities and streamed text."""
