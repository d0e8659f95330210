"""llama-server's own tests, run against `pop-local serve`."""
