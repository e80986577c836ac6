"""The one exception that means: what you asked for cannot be, and here is the sentence to say so."""


class UsageError(Exception):
    """Bad input. Its text is one sentence that names the value and the choices; the command line exits with 2."""
