"""Refinement: what a model's two refiners do, and whether they help each other."""

from analyses.experiments.refinement.experiment import refinement as refinement
from analyses.experiments.refinement.retrained import read_grid as read_grid
