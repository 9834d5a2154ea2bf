"""Experiment 10, Emotion Surgery: does the recipe of a feeling, added to the stream, turn what the model says?"""

from analyses.experiments.emotion_surgery.experiment import emotion_surgery as emotion_surgery
