"""Loading weights, with errors of one line."""


def load_weights(module, state):
    """``module.load_state_dict(state)``, where a state that does not fit is a ValueError that names one misfit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        # torch lists every misfit on a line of its own, below a heading.
        misfits = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(f"weights do not fit the {type(module).__name__}: {misfits[0].strip()}") from error
