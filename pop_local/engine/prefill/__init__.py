"""Prefill: the plan of full and pruned rows, and its execution on a KV cache."""
