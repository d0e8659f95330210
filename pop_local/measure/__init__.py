"""Measure the speedup and the quality loss from pruning, and check the loss against budgets."""
