"""The one exception whose message is meant for the person at the keyboard."""


class UserError(ValueError):
    """A setting, file or request that cannot work.

    The message is one line: what was wrong, where, what to do. The command line prints it
    without a traceback and exits with code 2; from Python it is an ordinary ``ValueError``.
    """
