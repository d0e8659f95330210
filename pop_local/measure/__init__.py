"""Measure the speed-up and the quality loss from pruning, and check the loss against budgets."""
