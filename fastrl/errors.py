"""The one exception for what a user can get wrong."""


class InputError(ValueError):
    """Something the user gave cannot be used: says what was expected, what came and what to do.

    The command line prints it as one line and exits with code 2; every other exception is a defect
    of the library and keeps its traceback.
    """


class NotFiniteError(InputError):
    """Training has diverged: what is in memory is no longer worth saving."""


def nearest(name: str, known: list[str]) -> str:
    """A hint naming the known spelling closest to `name`; the known ones if they are few."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known))}" if len(known) <= 20 else "no known name is close"
