"""Images in prompts: decoding with Pillow, then splitting and encoding with libmtmd."""
