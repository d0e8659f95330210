"""Measure the speed-up and the loss from pruning, and compare the loss with budgets."""
