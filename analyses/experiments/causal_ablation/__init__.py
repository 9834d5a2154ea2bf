"""Experiment 9, Causal Ablation: knock signals out and watch the prediction."""

from analyses.experiments.causal_ablation.experiment import causal_ablation as causal_ablation
