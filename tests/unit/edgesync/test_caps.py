"""Which cap holds when: times of day, zones, days on which clocks change, the lowest of several."""

import datetime as dt
import random
import re
from zoneinfo import ZoneInfo

import pytest

from edgesync import caps, limits

ROME = ZoneInfo("Europe/Rome")


def rome(text: str, fold: int = 0) -> float:
    return dt.datetime.fromisoformat(text).replace(tzinfo=ROME, fold=fold).timestamp()


def schedule(text: str, zone: str = "Europe/Rome") -> caps.Schedule:
    found = caps.parse(text, caps.load_zone(zone), zone)
    assert found is not None
    return found


def test_by_time_of_day() -> None:
    day = schedule("08:00-18:00 200kB/s; 2MB/s")
    assert [
        day.rate_at(rome(f"2026-11-24 {at}")) for at in ("07:59:59", "08:00", "17:59", "18:00")
    ] == [2_000_000, 200_000, 200_000, 2_000_000]
    assert day.next_change(rome("2026-11-24 09:00")) == rome("2026-11-24 18:00")
    assert day.next_change(rome("2026-11-24 18:00")) == rome("2026-11-25 08:00")


def test_over_midnight_and_to_its_end() -> None:
    night = schedule("22:00-06:00 1MB")
    assert (
        night.rate_at(rome("2026-11-24 23:00")) == night.rate_at(rome("2026-11-25 05:59")) == 10**6
    )
    assert night.rate_at(rome("2026-11-25 06:00")) == 0
    assert schedule("12:00-24:00 1MB").next_change(rome("2026-11-24 13:00")) == rome("2026-11-25")


def test_of_two_that_overlap_the_lower_holds_and_no_cap_is_the_highest() -> None:
    both = schedule("08:00-18:00 500kB; 12:00-13:00 100kB; 12:30-14:00 0; 9MB")
    assert [
        both.rate_at(rome(f"2026-11-24 {at}")) for at in ("09:00", "12:45", "13:30", "20:00")
    ] == [
        500_000,
        100_000,
        500_000,
        9_000_000,
    ]


def test_the_day_the_clock_jumps_forward() -> None:
    gap = schedule("02:30-03:30 100kB")  # 02:30 does not exist on 2026-03-29
    before = rome("2026-03-29 01:59")
    jump = rome("2026-03-29 03:00")
    assert gap.rate_at(before) == 0
    assert gap.next_change(before) == jump
    assert gap.rate_at(jump) == 100_000
    assert gap.next_change(jump) == rome("2026-03-29 03:30")


def test_the_day_an_hour_comes_twice() -> None:
    twice = schedule("02:15-02:45 100kB")  # both 02:15 of 2026-10-25
    first, second = rome("2026-10-25 02:15"), rome("2026-10-25 02:15", fold=1)
    assert second - first == 3600
    assert twice.next_change(rome("2026-10-25 01:00")) == first
    assert twice.next_change(first) == rome("2026-10-25 02:45")
    assert twice.next_change(rome("2026-10-25 02:45")) == second


@pytest.mark.parametrize("zone", ["Europe/Rome", "Australia/Lord_Howe", "America/St_Johns", "UTC"])
def test_the_next_change_is_the_first_minute_with_another_rate(zone: str) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    for _ in range(6):
        parts = []
        for _ in range(rng.randint(1, 3)):
            start, end = rng.sample(range(1440), 2)
            parts.append(
                f"{start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02} {rng.choice([100, 200])}kB"
            )
        found = schedule("; ".join([*parts, "1MB"]), zone)
        # Days around the changes of 2026 in each of these zones.
        day = rng.choice(["2026-03-08", "2026-03-29", "2026-04-05", "2026-10-04", "2026-10-25"])
        now = dt.datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp()
        now += rng.randrange(-720, 720) * 60
        rate = found.rate_at(now)
        expected = next(
            (now + 60 * n for n in range(1, 1501) if found.rate_at(now + 60 * n) != rate),
            None,
        )
        assert found.next_change(now) == expected, (zone, parts, now)


def test_the_lowest_wins_and_says_whose_it_is_and_until_when() -> None:
    site = caps.Cap("site plant-7", download=schedule("08:00-18:00 200kB/s"))
    own = caps.Cap("configuration", download=caps.parse(1_000_000))
    now = rome("2026-11-24 10:00")
    held = caps.lowest([own, site], upload=False, utc_now=now)
    assert str(held) == "200 kB/s until 18:00 Europe/Rome: site plant-7"
    after = caps.lowest([own, site], upload=False, utc_now=rome("2026-11-24 18:00"))
    assert str(after) == "1 MB/s: configuration"
    assert str(caps.lowest([own, site], upload=True, utc_now=now)) == "no cap"
    assert caps.next_change([own, site], utc_now=now) == rome("2026-11-24 18:00")


def test_an_ended_cap_does_not_hold() -> None:
    cap = caps.Cap("x", upload=caps.parse("10kB"), until=1000.0)
    assert caps.lowest([cap], upload=True, utc_now=999.0).until == 1000.0
    assert caps.lowest([cap], upload=True, utc_now=1000.0).rate_bytes_s == 0
    assert caps.next_change([cap], utc_now=999.0) == 1000.0
    assert caps.next_change([cap], utc_now=1000.0) is None


def test_no_rate_from_the_network_is_below_the_floor() -> None:
    low = schedule("08:00-18:00 1; 0").floored()
    assert low.rate_at(rome("2026-11-24 10:00")) == limits.MIN_CAP_BYTES_S
    assert low.rate_at(rome("2026-11-24 20:00")) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8:00-18:00 1MB", "does not begin with times such as 08:00-18:00"),
        ("08:00-08:00 1MB", "the two differ"),
        ("08:00-25:00 1MB", "does not begin|from 00:00 to 24:00"),
        ("24:30-01:00 1MB", "from 00:00 to 24:00"),
        ("1MB; 2MB", "two rates without times"),
        ("fast", "is not a rate"),
        ("-5", "'-5' is not a rate"),
        ("x" * 1000, "is no cap"),
        (True, "is no cap"),
        (None, "is no cap"),
    ],
)
def test_what_is_no_cap_is_said_in_a_sentence(text: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        caps.parse(text)


@pytest.mark.parametrize(
    "name", ["Mars/Base", "../etc/passwd", "", "Europe", "/etc/localtime", "a" * 99]
)
def test_what_is_no_zone(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape("is no time zone known here")):
        caps.load_zone(name)


def test_nothing_is_no_cap() -> None:
    assert caps.parse(0) is None
    assert caps.parse("0; 08:00-09:00 0") is None


@pytest.mark.parametrize("value", [10, "10", "7999", "08:00-18:00 1kB; 2MB"])
def test_a_configured_rate_below_the_floor_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="is below the floor of 8 kB/s"):
        caps.setting(value)


@pytest.mark.parametrize(
    ("value", "kept"),
    [(0, 0), ("0", 0), (8000, 8000), ("08:00-18:00 8kB; 0", "08:00-18:00 8kB; 0")],
)
def test_a_configured_rate_from_the_floor_up_is_kept(value: object, kept: object) -> None:
    assert caps.setting(value) == kept


def test_an_end_after_the_next_24_hours_is_shown_with_its_date() -> None:
    now = rome("2026-11-24 10:00")
    rate = schedule("1MB")
    for until, said in (
        (now + 86_399, "1 MB/s until 09:59 Europe/Rome: x"),
        (now + 86_400, "1 MB/s until 2026-11-25 10:00 Europe/Rome: x"),
    ):
        cap = caps.Cap("x", upload=rate, until=until)
        assert str(caps.lowest([cap], upload=True, utc_now=now)) == said


def test_what_is_only_believed_for_a_time_shows_no_end_and_ends() -> None:
    cap = caps.Cap("x", upload=caps.parse("10kB"), expires=1000.0)
    held = caps.lowest([cap], upload=True, utc_now=999.0)
    assert (held.until, str(held)) == (None, "10 kB/s: x")
    assert caps.next_change([cap], utc_now=999.0) == 1000.0
    assert caps.lowest([cap], upload=True, utc_now=1000.0).rate_bytes_s == 0
