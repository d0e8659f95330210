"""Decode answers with constrained sampling, log probabilities, and streamed text."""
