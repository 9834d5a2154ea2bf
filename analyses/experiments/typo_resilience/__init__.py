"""Experiment 6, Typo Resilience: is a misspelling read like the word that was meant?"""

from analyses.experiments.typo_resilience.experiment import typo_resilience as typo_resilience
