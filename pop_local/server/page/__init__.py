"""The chat page at /, and the endpoint that reads the files that users upload on the page."""
