"""Features of a dictionary, and the units of a model: what they respond to, what they write, what they are worth."""
