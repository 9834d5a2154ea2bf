"""Single units: when they fire, what they tell, and whether that is used."""
