"""The one exception that commands turn into a sentence instead of a traceback."""


class UserError(Exception):
    """An error that the user can correct.

    The message is one sentence that names the file, field or argument, says what is wrong with it, and what to do.
    Commands print it on stderr and exit with status 1 (see `deeplab_jax.cli`); library callers catch it as usual.
    """


class MissingExtraError(UserError):
    """A command needs packages of an extra that is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"this command needs the package '{package}'; install it with: pip install 'deeplab-jax[{extra}]'"
        )
