"""Scenario files: the shipped ones are read, and every mistake is one sentence with its place."""

from pathlib import Path

import pytest

from simulations.netlab.hosts import LabError
from simulations.netlab.scenario import SCENARIOS, find, load, parse_size

SITE = '[[site]]\nname = "plant"\n'


def read(tmp_path: Path, text: str) -> str:
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(LabError) as caught:
        load(path)
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_scenarios_are_read(path: Path) -> None:
    scenario = load(path)
    assert scenario.about
    assert scenario.devices >= 1
    assert find(path.stem) == path


def test_values_have_units(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(SITE + 'rate = "20Mbit"\nrtt = "100ms"\nloss = 0.01\nback.rate = "2Mbit"\n')
    site = load(path).sites[0]
    assert site.there.rate == 20e6
    assert site.there.delay == 0.05
    assert site.there.queue == 250_000  # one product of rate and round trip
    assert (site.back.rate, site.back.loss) == (2e6, 0.01)
    assert parse_size("1.5MB") == 1_500_000


def test_cuts_become_outages_and_kills_the_same_each_time() -> None:
    first, second = load(find("cuts")), load(find("cuts"))
    assert first == second
    kinds = [fault.do for fault in first.faults]
    assert (kinds.count("outage"), kinds.count("kill")) == (20, 5)
    assert all(1 <= fault.lasts <= 60 for fault in first.faults if fault.do == "outage")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "FILE: site: a scenario has at least one [[site]]"),
        ("x = ", "FILE: not TOML"),
        (SITE + 'rat = "20Mbit"', "FILE: site 1: rat: is not known here; did you mean rate?"),
        (SITE + 'rate = "20"', "FILE: site 1: rate: '20' is not a number with one of bit, kbit"),
        (SITE + "rate = 20", "FILE: site 1: rate: 20 is not a text"),
        (SITE + "loss = 2", "FILE: site 1: loss: 2.0 is not a share between 0 and 1"),
        (SITE + "nat = 1", "FILE: site 1: nat: 1 is not true or false"),
        ("[[site]]\n", "FILE: site 1: name: is missing"),
        (SITE + SITE, "FILE: site: two sites have the same name"),
        (
            SITE + '[[fault]]\ndo = "meteor"\nat = "1s"',
            "FILE: fault 1: do: 'meteor' is none of outage",
        ),
        (SITE + '[[fault]]\ndo = "outage"\nsite = "plant"', "FILE: fault 1: at: say either"),
        (
            SITE + '[[fault]]\ndo = "kill"\nat = "1s"\ndevice = "plant-2"',
            "FILE: fault 1: device: there is no device 'plant-2'",
        ),
        (
            SITE + '[[fault]]\ndo = "set"\nat = "1s"\nsite = "plant"\nvalues = {los = 1}',
            "FILE: fault 1: values: a link has no 'los'; did you mean loss?",
        ),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    said = read(tmp_path, text)
    assert said.startswith(sentence)
    assert "\n" not in said


def test_an_unknown_name_lists_what_is_shipped() -> None:
    with pytest.raises(LabError, match="shipped are cuts, gateway-dies"):
        find("no-such")
