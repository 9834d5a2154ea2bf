"""Experiment 11, Concept Inception: how strongly must a word's recipe be injected for the model to say the word?"""

from analyses.experiments.concept_inception.experiment import concept_inception as concept_inception
