"""Supernodes: nodes that do the same thing, tested by joint removal."""
