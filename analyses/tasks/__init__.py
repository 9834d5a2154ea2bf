"""Measures of a task on a data set of prompts, each a function from a model and `rl.Prompts` to a `Result`."""
