"""Attention explained: scores by pairs of sources, edges by heads."""
