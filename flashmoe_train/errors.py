"""The one exception that is ours, and what its texts have in common."""

import difflib
from collections.abc import Sequence

USAGE_ERROR = 2  # what a program that a UsageError has ended returns


class UsageError(ValueError):
    """A recipe, an option or an installation asks for something that cannot be done; its text says what is possible.

    The command line shows the text without a traceback.
    """


def nearest(name: str, choices: Sequence[str], otherwise: str = "possible: ") -> str:
    """A hint for the end of an error's text: the choice that was probably meant, or `otherwise` and all of them."""
    close = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise + ", ".join(choices)
