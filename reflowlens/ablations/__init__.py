"""Signals removed: at the readout in closed form, and before it."""
