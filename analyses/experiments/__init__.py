"""The experiments: a folder each, which offers a function of its name."""
