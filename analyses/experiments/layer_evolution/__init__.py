"""Experiment 7, Layer Evolution: from which layer on is the prediction decided?"""

from analyses.experiments.layer_evolution.experiment import layer_evolution as layer_evolution
