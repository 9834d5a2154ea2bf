"""Experiment 2, Sparsity Profile: how many signals does a token use, and are all signals used?"""

from analyses.experiments.sparsity_profile.experiment import sparsity_profile as sparsity_profile
