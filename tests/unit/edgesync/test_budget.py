"""Months, ledgers and clocks that jump."""

import datetime as dt
import json
import zoneinfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgesync import budget
from edgesync.budget import Ledger

ROME = zoneinfo.ZoneInfo("Europe/Rome")


def at(text: str, zone: dt.tzinfo = dt.UTC) -> float:
    return dt.datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


def test_a_month_begins_at_midnight_of_its_zone() -> None:
    last_second = at("2026-10-31T23:59:59", ROME)
    october, november = budget.month_at(last_second, ROME), budget.month_at(last_second + 1, ROME)
    assert (october.name, november.name) == ("October", "November")
    assert october.ends == november.began == last_second + 1
    # Clocks were set back in that October: it is an hour longer.
    assert october.ends - october.began == 31 * 86_400 + 3600
    assert budget.month_at(last_second, dt.UTC).name == "October"
    assert november.renews == "2026-12-01"
    assert budget.month_at(at("2026-12-31T23:30:00"), ROME).name == "January"


def test_what_is_spent_and_the_sentence() -> None:
    ledger = Ledger()
    now = at("2026-11-24T12:00:00")
    month = budget.month_at(now).number
    ledger.spend(1_500_000_000, month)
    verdict = budget.judge(ledger, 2_000_000_000, utc_now=now)
    assert verdict.left_bytes == 500_000_000
    assert str(verdict) == "1.5 GB of 2 GB spent in November; renews 2026-12-01"
    ledger.spend(600_000_000, month)
    spent = budget.judge(ledger, 2_000_000_000, utc_now=now)
    assert spent.left_bytes == 0
    assert spent.reason == "the budget of 2 GB for November is spent; renews 2026-12-01"
    of_site = budget.judge(ledger, 2_000_000_000, utc_now=now, owner="site plant-7")
    assert of_site.reason.startswith("the budget of site plant-7, 2 GB for November is spent")
    december = budget.judge(ledger, 2_000_000_000, utc_now=spent.month.ends)
    assert december.spent_bytes == 0


def test_going_back_refunds_nothing_and_going_far_ahead_blocks_nothing() -> None:
    ledger = Ledger()
    ledger.spend(100, 50)
    assert ledger.spent_in(49) == 100  # a month it never was in
    ledger.spend(10, 49)
    assert ledger.spent_in(50) == 110
    assert ledger.spent_in(900) == 0
    ledger.spend(5, 900)
    assert ledger.spent_in(50) == 110
    assert ledger.spent_in(51) == 0  # an honest roll-over after a wild jump
    ledger.spend(7, 51)
    assert ledger.spent_in(50) == 110


clocks = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 1000)), max_size=60)


@given(clocks)
def test_a_clock_that_goes_back_never_finds_more_left(moves: list[tuple[int, int]]) -> None:
    ledger = Ledger()
    month = 100
    for to, count in moves:
        before = ledger.spent_in(month)
        if to + 85 < month and to + 85 not in ledger.spent:
            assert ledger.spent_in(to + 85) >= before
        month = to + 85
        was = ledger.spent_in(month)
        ledger.spend(count, month)
        assert ledger.spent_in(month) == was + count
        assert len(ledger.spent) <= budget.MAX_MONTHS
        assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


@given(
    st.floats(min_value=at("2000-01-01"), max_value=at("2060-01-01")),
    st.sampled_from(["UTC", "Europe/Rome", "America/Sao_Paulo", "Asia/Beirut", "Pacific/Apia"]),
)
def test_a_moment_lies_in_its_month(now: float, name: str) -> None:
    zone = zoneinfo.ZoneInfo(name)
    month = budget.month_at(now, zone)
    assert month.began <= now < month.ends
    assert budget.month_at(month.ends, zone).number == month.number + 1
    assert budget.month_at(month.ends - 1, zone).number == month.number


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2_000_000_000), ("2GB/month", 2_000_000_000), ("500MiB", 500 << 20), (0, 0), ("0", 0)],
)
def test_sizes(text: object, size: int) -> None:
    assert budget.parse(text) == size


@pytest.mark.parametrize("text", ["2GB/day", "2GB/s", "many", -1, True, None, "2 GB a month"])
def test_what_is_no_budget(text: object) -> None:
    with pytest.raises(ValueError, match="is no budget: write bytes for each month such as 2GB"):
        budget.parse(text)


@pytest.mark.parametrize("kept", [None, {}, {"last": 5, "spent": {}}, {"last": 5, "spent": 3}, 7])
def test_what_is_no_ledger(kept: object) -> None:
    with pytest.raises(ValueError, match="ledger"):
        Ledger.from_json(kept)
