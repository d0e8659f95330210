"""The POP file format, and the plans, fits and writers that produce it."""

__version__ = "0.1.0"
