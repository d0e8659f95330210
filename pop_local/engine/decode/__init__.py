"""Decoding: constrained sampling, log probabilities, and streamed text."""
