import pytest

from edgesync.errors import UsageError
from edgesync.selectors import parse, parse_label

LABELS = {"region": "eu", "site": "lab", "tier": "a"}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("region=eu", True),
        ("region == eu", True),
        ("region=us", False),
        ("region!=us", True),
        ("region=eu,site!=lab", False),
        ("missing!=x", True),
        ("missing=", False),
        ("tier in (a,b)", True),
        ("tier in (b, c)", False),
        ("tier notin (b,c),region=eu", True),
        ("missing notin (a)", True),
        ("site", True),
        ("!site", False),
        ("!gpu", True),
        ("gpu", False),
    ],
)
def test_matches(text, matches):
    assert parse(text).matches(LABELS) is matches


@pytest.mark.parametrize(
    "text",
    [
        "=x",
        "a=b=c",
        "a in b",
        "a,,b",
        "a in (b",
        "a=b c",
        "a;b",
        "\x00",
        "x" * 5000,
        "a," * 70 + "a",
    ],
)
def test_refused(text):
    with pytest.raises(UsageError):
        parse(text)


def test_labels():
    assert parse_label("rack=12.a") == ("rack", "12.a")
    assert parse_label("gpu=") == ("gpu", "")
    for text in ("gpu", "=x", "a b=c", "a=b c", "a=\x1b[1m", "k=" + "v" * 64, "k" * 64 + "=v"):
        with pytest.raises(UsageError):
            parse_label(text)
