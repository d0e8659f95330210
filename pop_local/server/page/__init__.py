"""The chat page at /, and the endpoint that reads files uploaded to it."""
