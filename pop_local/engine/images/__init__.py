"""Pictures in prompts: Pillow decodes them, and libmtmd splits and encodes them."""
