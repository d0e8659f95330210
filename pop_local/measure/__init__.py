"""What pruning gains, measured and bounded."""
