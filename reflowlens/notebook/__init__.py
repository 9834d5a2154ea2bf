"""What notebooks show beside figures: tokens, attention, tables; HTML that opens without a network."""
