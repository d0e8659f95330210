"""Depth of KV cache rows: deep rows by token, deep passes and refills."""
