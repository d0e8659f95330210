"""Analyses beside the product; some need torch. Commands import them when they are asked for."""
