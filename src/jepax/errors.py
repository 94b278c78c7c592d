"""The error that a user can fix, and its message. Imports nothing, so that the command line starts at once."""


class UserError(ValueError):
    """Bad input from a user. The message takes one to five lines and names the field, the value and the way out.

    The command line prints it without a traceback and exits with code 2.
    """


def user_message(error: BaseException) -> str | None:
    """The message for an error that a user can fix; None for all other errors."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return "the device ran out of memory; lower train.batch_size (see --dry-run), or a protocol's"
    return None
