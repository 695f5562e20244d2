"""`rlsae <verb>`: one verb per stage, and a few to look at configurations and results."""

from __future__ import annotations

import errno
import os
import re
import sys

from rlsae.cli import plant, results, stages
from rlsae.cli.app import app
from rlsae.errors import RlsaeError
from rlsae.resumable import AlreadyFinished

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
    except AlreadyFinished:
        pass
    except RlsaeError as error:
        if debug:
            raise
        sys.exit(f"error: {error}")
    except Exception as error:
        code = number_of(error)
        if debug or code not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        where = getattr(error, "filename", None) or "the results"
        sys.exit(f"error: cannot write {where}: {os.strerror(code)}; make room or choose another folder")


def number_of(error: Exception) -> int | None:
    """The system's number of an error, also where a library that is written in Rust tells it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None
