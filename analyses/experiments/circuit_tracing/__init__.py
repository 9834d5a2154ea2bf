"""Experiment 13, Circuit Tracing: which features made a prediction, along which paths, and what can one of them do?"""

from analyses.experiments.circuit_tracing.experiment import circuit_tracing as circuit_tracing
