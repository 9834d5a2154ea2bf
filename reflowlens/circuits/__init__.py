"""Circuits: estimates from gradients, edges of the residual stream, paths, and the parts that suffice."""
