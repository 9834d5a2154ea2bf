"""Experiment 5, Semantic Algebra: does a - b + c land on the word that completes the analogy?"""

from analyses.experiments.semantic_algebra.experiment import semantic_algebra as semantic_algebra
