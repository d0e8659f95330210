"""The HTTP face of the engine: OpenAI's API, one model, one request at a time."""
