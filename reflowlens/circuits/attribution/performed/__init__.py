"""What a graph says, done in the model: interventions, validation, faithfulness, doses."""
