"""Checks of arguments that the data modules share."""


def check_integer(name, value, minimum):
    """Raise ValueError unless ``value`` is an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        allowed = {0: "a non-negative integer", 1: "a positive integer"}[minimum]
        raise ValueError(f"{name} must be {allowed}; got {value!r}")
