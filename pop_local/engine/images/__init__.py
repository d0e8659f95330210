"""Decode images in prompts with Pillow, then split and encode them with libmtmd."""
