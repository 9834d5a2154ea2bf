"""Experiment 1, Recipe Atlas: which words have alike recipes, and what does each signal stand for?"""

from analyses.experiments.recipe_atlas.experiment import recipe_atlas as recipe_atlas
