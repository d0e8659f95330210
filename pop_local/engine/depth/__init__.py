"""Rows that run all layers: deep rows, which are selected by their tokens, and refilled rows."""
