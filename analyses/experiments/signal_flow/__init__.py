"""Experiment 8, Signal Flow: which signals make a prediction, from where on, and who writes them?"""

from analyses.experiments.signal_flow.experiment import signal_flow as signal_flow
