"""Influence, paths, sums and scores of graphs."""
