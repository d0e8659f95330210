"""Fetching models: those of the catalog (wheels), of a hub, and of any URL."""
