"""Pictures as rows of a prompt: decoded by Pillow, then split and embedded by libmtmd."""
