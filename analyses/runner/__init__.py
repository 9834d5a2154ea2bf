"""Running several experiments, of one model or of several."""
