import pytest

from edgesync import jointoken
from edgesync.errors import NotFoundError, UsageError
from edgesync.ids import Digest
from gateway.service import tokens

GIVEN = {
    "root_version": 1,
    "root_sha256": Digest("b" * 64),
    "addresses": ["gw:7443"],
    "utc_now": 1000.0,
}


def test_token_says_what_a_machine_needs_and_is_stored_hashed(register):
    made = tokens.create(
        register, **GIVEN, site="lab", labels={"rack": "2"}, hardware="pi4", id_pattern="cam-*"
    )
    token = jointoken.decode(made.token)
    assert (
        token.token_id,
        token.gateway_key,
        token.root_version,
        token.root_sha256,
        token.addresses,
    ) == (
        made.id,
        "a" * 64,
        1,
        "b" * 64,
        ("gw:7443",),
    )
    assert made.join_command == f"echo {made.token} | edgesync agent join --token-file -"
    assert (made.expires, made.uses, made.pending) == (4600.0, 1, False)
    dump = "\n".join(register.db.conn.iterdump())
    assert token.secret.hex() not in dump.lower()
    [row] = tokens.list_tokens(register, utc_now=1001.0)
    assert (row["state"], row["labels"], row["auto_accept"]) == (
        "active",
        {"rack": "2", "site": "lab"},
        True,
    )
    assert [e["kind"] for e in register.rows("SELECT kind FROM events")] == ["token.created"]


def test_many_uses_wait_unless_auto_accept(register):
    assert tokens.create(register, **GIVEN, uses=5).pending
    assert not tokens.create(register, **GIVEN, uses=5, auto_accept=True).pending


def test_states_and_revocation(register):
    made = tokens.create(register, **GIVEN)
    assert tokens.list_tokens(register, utc_now=made.expires)[0]["state"] == "expired"
    tokens.revoke(register, made.id, utc_now=1001.0)
    tokens.revoke(register, made.id, utc_now=1002.0)
    assert tokens.list_tokens(register, utc_now=1003.0)[0]["state"] == "revoked"
    assert len(register.rows("SELECT 1 FROM events WHERE kind = 'token.revoked'")) == 1
    with pytest.raises(NotFoundError, match="edgesync token list"):
        tokens.revoke(register, "nosuchtoken", utc_now=1001.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"ttl_s": 0},
        {"ttl_s": 10**9},
        {"uses": 0},
        {"uses": 10**6},
        {"hardware": "a b"},
        {"id_pattern": "Cam"},
        {"id_pattern": ""},
        {"site": "a b"},
        {"labels": {"k": "v" * 64}},
        {"labels": {f"k{n}": "" for n in range(65)}},
        {"addresses": []},
    ],
)
def test_out_of_range(register, bad):
    with pytest.raises(UsageError):
        tokens.create(register, **(GIVEN | bad))
