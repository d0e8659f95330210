"""The chat page at /, and the endpoint that reads its uploaded files."""
