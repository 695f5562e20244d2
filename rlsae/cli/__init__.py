"""`rlsae <verb>`: one verb per stage, and a few to look at configurations and results."""

from __future__ import annotations

import errno
import os
import sys

from rlsae.cli import plant, results, stages
from rlsae.cli.app import app
from rlsae.errors import RlsaeError

__all__ = ["app", "main", "plant", "results", "stages"]


def main() -> None:
    """Run the command line; mistakes that people can mend are explained without a traceback."""
    # Waiting threads sleep instead of spinning: an eighth slower alone, six times faster beside another job.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except RlsaeError as error:
        if debug:
            raise
        sys.exit(f"error: {error}")
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        sys.exit(f"error: cannot write {error.filename or 'the results'}: {error.strerror}; make room or choose another folder")
