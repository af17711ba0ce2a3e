"""How a command ends: one sentence on stderr and a documented exit code, no traceback for an expected fault."""

import os
import sys
from collections.abc import Callable

from edgesync.errors import EdgeSyncError, ExitCode

INTERRUPTED = 130


def run(command: Callable[[], object]) -> int:
    """Call ``command`` and turn what it raises into an exit code."""
    try:
        command()
    except EdgeSyncError as exc:
        complain(str(exc))
        return int(exc.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is wrong, and Python must not complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except PermissionError as exc:
        complain(
            f"no permission for {exc.filename}: run as the owner of the data directory, or as root"
        )
        return ExitCode.FAILURE
    except OSError as exc:
        where = f" ({exc.filename})" if exc.filename else ""
        complain(f"{exc.strerror or exc}{where}")
        return ExitCode.FAILURE
    return ExitCode.OK


def complain(sentence: str) -> None:
    sys.stderr.write(f"edgesync: {sentence}\n")
