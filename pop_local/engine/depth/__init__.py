"""Rows that run all layers: deep rows, chosen by token, and refilled rows."""
