"""Activations: caches with signals, and statistics of more positions than fit into memory."""
