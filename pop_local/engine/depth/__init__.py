"""Rows that run all layers: deep rows, which are chosen by token, and refilled rows."""
