"""Experiment 4, Semantic Galaxy: do the recipes of related words lie together?"""

from analyses.experiments.semantic_galaxy.experiment import semantic_galaxy as semantic_galaxy
