"""The chat page at /, and the endpoint that reads files uploaded on the page."""
