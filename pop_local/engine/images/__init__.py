"""Pictures in prompts, decoded by Pillow and then split and encoded by libmtmd."""
