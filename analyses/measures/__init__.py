"""Measures that several experiments share: functions from activations to numbers."""
