"""What a device shows of the caps its gateway signs."""

import asyncio
from typing import Any

from device.caps import DeviceCaps
from edgesync.wire.mqtt import CapEntry, Caps

NOW = 1_790_000_000.0
DAY_S = 86_400.0


async def _in_storage(*_: object) -> None:
    raise AssertionError("there is no storage")


def _rows(*entries: CapEntry, now: float = NOW) -> list[dict[str, Any]]:
    device = DeviceCaps(
        device_id="cam-3",
        site="plant-7",
        own=[],
        state=None,
        in_storage=_in_storage,
        utc_now=lambda: now,
    )
    message = Caps(
        gateway="gw", sequence=1, issued=NOW, expires=NOW + 14 * DAY_S, caps=list(entries)
    )
    asyncio.run(device.heard(message))
    return device.rows()


def test_the_end_of_a_message_is_not_shown_as_the_end_of_its_caps() -> None:
    endless = CapEntry(scope="device", target="cam-3", download="40kB/s")
    (row,) = _rows(endless)
    assert (row["until"], row["text"]) == (None, "40 kB/s: device cam-3")
    assert _rows(endless, now=NOW + 14 * DAY_S) == []


def test_an_end_that_was_set_is_shown() -> None:
    (row,) = _rows(CapEntry(scope="site", target="plant-7", upload="40kB/s", until=NOW + 2 * DAY_S))
    assert row["until"] == NOW + 2 * DAY_S
    assert row["text"] == "40 kB/s until 2026-09-23 14:13 UTC: site plant-7"
