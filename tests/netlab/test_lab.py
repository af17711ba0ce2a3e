"""The laboratory on this machine: links do what they say, nothing stays behind, programs finish over them.

Namespaces need root; elsewhere these tests are skipped and the summary says so.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simulations.netlab.forwarder import Impairment
from simulations.netlab.hosts import LabError, is_alive, run
from simulations.netlab.lab import Lab
from simulations.netlab.verify import ping

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or shutil.which("ip") is None
    or shutil.which("ping") is None
    or shutil.which("cc") is None
    or not Path("/dev/net/tun").exists(),
    reason="a laboratory needs root, iproute2, ping, a C compiler and /dev/net/tun",
)


def namespaces(prefix: str) -> list[str]:
    return [
        line.split()[0]
        for line in run("ip", "netns", "list").splitlines()
        if line.startswith(prefix)
    ]


def test_devices_of_a_site_see_each_other_and_the_source_over_the_link() -> None:
    with Lab() as lab:
        site = lab.add_site("plant", devices=2, there=Impairment(delay=0.03))
        one, two = site.devices
        assert len(ping(one, two.address, count=2)) == 2
        over = ping(lab.source, one.address, count=5)
        assert len(over) == 5
        assert all(rtt >= 60 for _, rtt in over)


def test_a_link_that_is_down_lets_nothing_pass_and_counts_it() -> None:
    with Lab() as lab:
        site = lab.add_site("plant", devices=1)
        host = site.devices[0]
        site.link.set(down=1)
        assert ping(lab.source, host.address, count=3) == []
        site.link.set(down=0)
        assert len(ping(lab.source, host.address, count=3)) == 3
        there, _back = site.link.counters()
        assert there.while_down >= 3


def test_packets_are_lost_as_asked() -> None:
    with Lab(seed=11) as lab:
        site = lab.add_site("plant", devices=1, there=Impairment(loss=0.3), back=Impairment())
        came = ping(lab.source, site.devices[0].address, count=100)
        there, back = site.link.counters()
        assert 40 <= len(came) <= 95
        assert 100 - len(came) <= there.lost <= 60
        assert back.lost == 0


def test_a_large_packet_vanishes_in_a_black_hole() -> None:
    with Lab() as lab:
        site = lab.add_site("plant", devices=1, there=Impairment(mtu=1300))
        host = site.devices[0]
        assert len(ping(lab.source, host.address, count=2, size=1272)) == 2
        assert ping(lab.source, host.address, count=2, size=1273) == []


def test_a_moved_device_is_reached_at_its_new_address_only() -> None:
    with Lab() as lab:
        host = lab.add_site("plant", devices=1).devices[0]
        before = host.address
        after = lab.move(host)
        assert after != before
        assert len(ping(lab.source, after, count=2)) == 2
        assert ping(lab.source, before, count=2) == []


def test_what_a_killed_run_left_behind_is_removed_by_the_next() -> None:
    script = (
        "import sys,signal\nfrom simulations.netlab.lab import Lab\n"
        "lab=Lab(); lab.add_site('plant', devices=1)\nprint('up',flush=True)\n"
        "import pathlib\nchild = lab.source.start('sleep', ['sleep', '1000'], log=pathlib.Path('/dev/null'))\n"
        "print(child.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        left = namespaces(f"nl{child.pid}-")
        assert len(left) == 4
        sleeper = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_alive(sleeper):
        assert time.monotonic() < deadline, "a process outlived its laboratory"
    with Lab():
        assert namespaces(f"nl{child.pid}-") == []


def test_a_firewall_lets_no_udp_pass_or_one_tcp_port_only() -> None:
    listen = "import socket,sys;s=socket.create_server(('0.0.0.0',int(sys.argv[1])));print(1,flush=True);s.accept()"
    dial = "import socket,sys;socket.create_connection((sys.argv[1],int(sys.argv[2])),1.5).close()"
    with Lab() as lab:
        site = lab.add_site("plant", devices=1)
        host = site.devices[0]
        for port, passes in ((4000, True), (4001, False)):
            site.link.set(only_port=4000)
            server = subprocess.Popen(
                lab.source.inside([sys.executable, "-c", listen, str(port)]),
                stdout=subprocess.PIPE,
                text=True,
            )
            assert server.stdout is not None
            assert server.stdout.readline() == "1\n"
            done = subprocess.run(
                host.inside([sys.executable, "-c", dial, lab.source.address, str(port)]),
                capture_output=True,
                check=False,
            )
            server.kill()
            server.communicate()
            assert (done.returncode == 0) == passes
        assert ping(lab.source, host.address, count=2) == []
        site.link.set(only_port=0, no_udp=1)
        assert len(ping(lab.source, host.address, count=2)) == 2
        before = site.link.counters()[1].blocked
        host.call(
            sys.executable,
            "-c",
            "import socket,sys;socket.socket(socket.AF_INET,socket.SOCK_DGRAM).sendto(b'x',(sys.argv[1],9))",
            lab.source.address,
        )
        assert site.link.counters()[1].blocked == before + 1


def test_only_nat_can_be_rebound() -> None:
    with Lab() as lab:
        site = lab.add_site("plant", devices=1)
        with pytest.raises(LabError, match="has no NAT"):
            lab.rebind(site)


def test_a_small_scenario_end_to_end(tmp_path: Path) -> None:
    scenario = tmp_path / "small.toml"
    scenario.write_text(
        'bundle.size = "3MB"\ntimeout = "90s"\n[[site]]\nname = "plant"\ndevices = 2\nrate = "20Mbit"\n'
        'rtt = "40ms"\nloss = 0.01\n[[fault]]\ndo = "outage"\nsite = "plant"\nat_progress = 0.3\nfor = "2s"\n'
    )
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "simulations.netlab", "run", str(scenario), "--json", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("intact") == 2
    assert "fault" in done.stdout
    assert out.read_text().startswith('{\n "schema": "netlab/1"')


@pytest.mark.parametrize("scenario", ["udp-blocked", "one-port"])
def test_a_device_joins_and_gets_its_bundle_where_udp_is_blocked(
    scenario: str, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    done = subprocess.run(
        [sys.executable, "-m", "simulations.netlab", "run", scenario]
        + ["--size", "2MB", "--keep", str(kept)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("intact") == 1
    told = (kept / "plant-1.log").read_text()
    assert "never retrieved" not in told, told
    assert "Traceback" not in told, told
    if scenario == "one-port":
        asked = (kept / "proxy.log").read_text()
        assert ":7443" in asked
        assert ":8883" in asked
