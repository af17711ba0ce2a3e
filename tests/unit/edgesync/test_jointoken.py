import pytest

from edgesync import jointoken
from edgesync.errors import UsageError
from edgesync.ids import Digest, PeerKey
from edgesync.jointoken import JoinToken

TOKEN = JoinToken(
    "abcdefgh2345",
    b"s" * 32,
    PeerKey("ab" * 32),
    3,
    Digest("cd" * 32),
    ("gw.example.org:7443", "[::1]:1"),
)


def test_round_trip():
    text = jointoken.encode(TOKEN)
    assert jointoken.decode(f"  {text}\n") == TOKEN
    assert text.isascii()
    assert "s" * 32 not in repr(TOKEN)


def test_every_cut_and_change_is_refused():
    text = jointoken.encode(TOKEN)
    for cut in range(len(text)):
        with pytest.raises(UsageError):
            jointoken.decode(text[:cut])
    for at in range(3, len(text)):
        with pytest.raises(UsageError):
            jointoken.decode(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])


@pytest.mark.parametrize(
    "text", ["", "hello", "es1", "es1!!!!", "es1" + "A" * 5000, "es1\u00e9\u00e9\u00e9\u00e9"]
)
def test_not_a_token(text):
    with pytest.raises(UsageError):
        jointoken.decode(text)


def test_ids_fit_the_wire_pattern():
    for _ in range(100):
        text = jointoken.new_id()
        assert len(text) == 12
        assert text.isalnum()
        assert text == text.lower()
