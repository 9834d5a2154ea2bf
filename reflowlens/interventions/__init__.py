"""Interventions as values, running a model under them, and sweeps over many of them."""
