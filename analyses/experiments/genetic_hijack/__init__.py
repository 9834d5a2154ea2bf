"""Experiment 12, Genetic Hijack: what happens if the recipes themselves are edited?"""

from analyses.experiments.genetic_hijack.experiment import genetic_hijack as genetic_hijack
