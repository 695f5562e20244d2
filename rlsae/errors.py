"""The one exception that is meant for people."""


class RlsaeError(Exception):
    """A mistake that the user can mend: names the key, file, document or layer, what was expected, and what to do.

    The command line prints its message without a traceback and exits with status 1.
    """
