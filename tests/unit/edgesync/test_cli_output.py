import errno
import json
import os
import subprocess
import sys

import pytest

from edgesync.cli import errors, output
from edgesync.errors import ConfigError, ExitCode, NotFoundError, VerificationError


def test_remote_text_cannot_drive_a_terminal() -> None:
    assert output.clean("a\x1b[31mb\u202ec\nd") == "a�[31mb�c�d"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (5e12, "5.0 TB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert output.size(count) == text


def test_a_table_lines_up(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("A", "LONG"), [("xxxx", 1), ("y", 22)])
    assert capsys.readouterr().out == "A     LONG\nxxxx  1\ny     22\n"


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.Progress("x") as progress:
        progress.update(1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("c"), 78),
        (NotFoundError("n"), 6),
        (VerificationError("v"), 5),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1),
        (PermissionError(errno.EACCES, "denied", "/x"), 1),
    ],
)
def test_an_error_is_one_sentence_and_a_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert errors.run(fail) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("edgesync: ")
    assert told.err.count("\n") == 1


def test_what_is_unexpected_is_not_hidden() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        errors.run(fail)


def test_a_reader_that_went_away_is_no_failure() -> None:
    program = "from edgesync.cli import errors\ndef f(): raise BrokenPipeError\nraise SystemExit(errors.run(f))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (ExitCode.OK, b"")


def _edgesync(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EDGESYNC_")}
    return subprocess.run(
        [sys.executable, "-m", "edgesync", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys, runpy, json, io, contextlib\n"
        "sys.argv = ['edgesync', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    runpy.run_module('edgesync', run_name='__main__')\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert not loaded & {
        "aioquic",
        "aiomqtt",
        "amqtt",
        "cryptography",
        "nacl",
        "sqlite3",
        "tuf",
        "zeroconf",
        "asyncio",
    }


@pytest.mark.parametrize("role", ["gateway", "agent"])
def test_a_missing_data_directory_is_78(role: str, tmp_path: os.PathLike[str]) -> None:
    done = _edgesync(role, "status", "--data", f"{os.fspath(tmp_path)}/none")
    assert done.returncode == ExitCode.CONFIG
    assert "edgesync" in done.stderr
    assert done.stderr.count("\n") == 1
