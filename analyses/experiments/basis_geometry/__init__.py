"""Experiment 3, Basis Geometry: how many directions does the signal basis use, and are they those of the residuals?"""

from analyses.experiments.basis_geometry.experiment import basis_geometry as basis_geometry
