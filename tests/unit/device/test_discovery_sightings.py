import ipaddress
import random

from device.discovery import FALSE_FOR_S, MAX_HOSTS, MAX_PAUSES, SERVICE, Sightings, parse_txt
from edgesync import limits


def txt(identity: str = "cam-1", fingerprint: str = "ab" * 8) -> bytes:
    entries = [b"v=1", b"id=" + identity.encode(), b"fp=" + fingerprint.encode(), b"root=3"]
    return b"".join(bytes((len(entry),)) + entry for entry in entries)


def sightings() -> Sightings:
    found = Sightings("ff" * 8)
    found.networks = [ipaddress.ip_network("192.168.7.0/24")]
    return found


def hear(
    found: Sightings, label: str, *, address: str = "192.168.7.9", fingerprint: str = "ab" * 8
) -> None:
    found.service(f"{label}.{SERVICE}", f"{label}.local.", 7000)
    found.text(f"{label}.{SERVICE}", txt(label, fingerprint))
    found.address(f"{label}.local.", address)


def test_txt_is_bounded_and_strict() -> None:
    parsed = parse_txt(txt())
    assert parsed is not None
    assert parsed["id"] == "cam-1"
    assert parse_txt(txt() + b"\xff" + b"x" * 500) is None
    assert parse_txt(txt(identity="Cam 1")) is None
    assert parse_txt(txt(fingerprint="zz" * 8)) is None
    assert parse_txt(b"\x03v=2") is None
    assert parse_txt(b"\xff") is None


def test_only_on_link_addresses_are_dialed() -> None:
    found = sightings()
    hear(found, "cam-1", address="8.8.8.8")
    assert found.next_candidate(now=0.0) is None
    found.address("cam-1.local.", "192.168.7.20")
    picked = found.next_candidate(now=0.0)
    assert picked is not None
    assert picked[1].addresses == (("192.168.7.20", 7000),)
    assert picked[1].root_version == 3


def test_our_own_announcement_is_not_a_peer() -> None:
    found = sightings()
    hear(found, "me", fingerprint="ff" * 8)
    assert found.next_candidate(now=0.0) is None


def test_back_off_grows_and_false_ones_are_left_alone() -> None:
    found = sightings()
    hear(found, "cam-1")
    pauses = []
    now = 0.0
    for _ in range(4):
        picked = found.next_candidate(now=now)
        assert picked is not None
        found.settle(*picked, "unreachable", now=now)
        begun = now
        while found.next_candidate(now=now) is None:
            now += 0.5
        pauses.append(now - begun)
    assert pauses == sorted(pauses)
    assert pauses[-1] >= 4 * pauses[0]
    picked = found.next_candidate(now=now)
    assert picked is not None
    found.settle(*picked, "false", now=now)
    hear(found, "cam-1")
    assert found.next_candidate(now=now + FALSE_FOR_S - 1) is None
    assert found.next_candidate(now=now + FALSE_FOR_S + 1) is not None


def test_a_false_announcement_does_not_silence_the_key_it_names() -> None:
    found = sightings()
    hear(found, "honest", address="192.168.7.2")
    hear(found, "evil", address="192.168.7.66")
    for _ in range(2):
        picked = found.next_candidate(now=0.0)
        assert picked is not None
        is_evil = picked[0].startswith("evil")
        found.settle(*picked, "false" if is_evil else "connected", now=0.0)
    # Also under the honest one's own name, and with a further address for its host.
    found.service(f"honest.{SERVICE}", "evil.local.", 7000)
    picked = found.next_candidate(now=60.0)
    assert picked is not None
    found.settle(*picked, "false", now=60.0)
    assert found.next_candidate(now=61.0) is None
    found.service(f"honest.{SERVICE}", "honest.local.", 7000)
    found.address("honest.local.", "192.168.7.67")
    for now in (62.0, 63.0):
        picked = found.next_candidate(now=now)
        assert picked is not None
        if picked[1].addresses == (("192.168.7.2", 7000),):
            break
        found.settle(*picked, "false", now=now)
    assert picked is not None
    assert picked[1].addresses == (("192.168.7.2", 7000),)


def test_pauses_are_bounded() -> None:
    found = sightings()
    for number in range(2 * MAX_PAUSES):
        hear(found, "evil", fingerprint=f"{number:016x}")
        picked = found.next_candidate(now=0.0)
        assert picked is not None
        found.settle(*picked, "false", now=0.0)
    assert len(found._pauses) <= MAX_PAUSES


def test_flood_is_bounded_and_keeps_who_answered() -> None:
    found = sightings()
    hear(found, "honest")
    picked = found.next_candidate(now=0.0)
    assert picked is not None
    found.settle(*picked, "connected", now=0.0)
    rng = random.Random(2)
    for _ in range(5000):
        hear(found, f"fake-{rng.getrandbits(40):x}", fingerprint=f"{rng.getrandbits(64):016x}")
    assert len(found) <= limits.MAX_PEER_CANDIDATES
    assert len(found._hosts) <= MAX_HOSTS
    assert f"honest.{SERVICE}" in found._instances
