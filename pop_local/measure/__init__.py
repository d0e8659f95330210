"""The gains and losses of pruning, measured and bounded."""
