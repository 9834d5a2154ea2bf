"""Attribution graphs: which features of a prompt made which, and in the end a prediction."""
