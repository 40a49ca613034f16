"""The one exception that is ours."""


class UsageError(ValueError):
    """A recipe, an option or an installation asks for something that cannot be done; its text says what is possible.

    The command line shows the text without a traceback.
    """
