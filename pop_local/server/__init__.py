"""The HTTP face of the engine: the APIs that programs speak, one model, one request at a time."""
