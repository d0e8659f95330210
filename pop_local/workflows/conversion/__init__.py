"""Conversion: choose how deep, fit, measure, write."""
