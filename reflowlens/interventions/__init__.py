"""Interventions as values, running a model under them, and weight edits."""
