"""Training of dictionaries: activations harvested from a model, and several dictionaries fitted to them at once."""
