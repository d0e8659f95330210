"""Rows that run through all layers: refilled rows and deep rows."""
