"""The README's commands do what it says: every block is executed, with only addresses and directories replaced."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgesync.demo import source
from edgesync.demo.fleet import free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
MAX_LINES = 150


def test_it_is_short_and_has_the_two_blocks() -> None:
    assert len(README.splitlines()) <= MAX_LINES
    assert len(BLOCKS) == 2


def test_the_make_targets_exist() -> None:
    commands = [line.split("#")[0].split() for line in BLOCKS[0].splitlines() if line.strip()]
    assert commands == [["make", "demo"], ["make", "test"]]
    for command in commands:
        subprocess.run([*command, "-n"], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with ./app in it and an `edgesync` that keeps the two roles of the README apart on one machine."""
    quic, mqtt = free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_STREAM)
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "edgesync"
    shim.write_text(
        "#!/bin/sh\n"
        f"case $1 in agent|get) export EDGESYNC_DATA={tmp_path}/agent EDGESYNC_INTERFACE=127.0.0.1 "
        "EDGESYNC_LISTEN_QUIC=127.0.0.1:0;;\n"
        f"*) export EDGESYNC_DATA={tmp_path}/gateway EDGESYNC_LISTEN_QUIC=127.0.0.1:{quic} "
        f"EDGESYNC_LISTEN_MQTT=127.0.0.1:{mqtt} EDGESYNC_LISTEN_HTTP=127.0.0.1:{free_port(socket.SOCK_STREAM)};;\n"
        f'esac\nexec {shlex.quote(sys.executable)} -m edgesync "$@"\n'
    )
    shim.chmod(0o755)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "hello.txt").write_text("hello\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EDGESYNC_")}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{environment['PATH']}", "QUIC": str(quic)}
    return tmp_path, environment


@pytest.mark.slow
def test_a_fleet_in_six_commands(machine: tuple[Path, dict[str, str]]) -> None:
    folder, environment = machine
    background = []
    commands = [line.split("#")[0].strip() for line in BLOCKS[1].splitlines()]
    commands = [command for command in commands if command]
    assert (
        len([c for c in commands if not c.startswith(("edgesync publish", "edgesync assign"))]) == 5
    )
    try:
        for command in commands:
            text = command.replace("gateway.example.net", f"127.0.0.1:{environment['QUIC']}")
            if text.endswith("&"):
                background.append(
                    subprocess.Popen(
                        ["sh", "-c", "exec " + text.removesuffix("&")],
                        cwd=folder,
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                )
                _until_up(text, folder, environment)
            else:
                done = subprocess.run(
                    ["sh", "-c", text],
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, f"{command}: {done.stderr}"
        want = source.describe(folder / "app")
        assert source.first_difference(want, folder / "agent/bundles/app/current") is None
    finally:
        for process in background:
            process.terminate()
        for process in background:
            process.wait(20)


def _until_up(command: str, folder: Path, environment: dict[str, str]) -> None:
    """A person reads on while a daemon starts; the test polls its status."""
    words = command.split()[:2]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done = subprocess.run(
            [words[0], words[1], "status", "--json"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            told = json.loads(done.stdout)
            up = told["gateway"]["connected"] if words[1] == "agent" else told["running"]
            if up:
                return
        time.sleep(0.2)
    pytest.fail(f"{command} did not come up")
