"""The one error type that means "the input was wrong", shown by the command line without a traceback."""


class ReflowlensError(ValueError):
    """Bad input: names the thing, what was expected, and the nearest right choice."""
