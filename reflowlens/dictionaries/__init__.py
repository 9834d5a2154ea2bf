"""Dictionaries of features: sparse autoencoders and transcoders of any hooked model."""
