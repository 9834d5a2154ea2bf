"""A model on one prompt as a linear map: what is held, and what stands for its MLPs."""
