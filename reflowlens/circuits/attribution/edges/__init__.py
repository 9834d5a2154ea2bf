"""Every edge of a graph: targets pulled back through the frozen model, rows kept, nodes named."""
