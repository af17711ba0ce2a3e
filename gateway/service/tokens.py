"""What an operator can do with join tokens: create, list, revoke.

A token's secret is stored hashed (32 random bytes need no slow hash) and shown once. Its limits are kept here and
applied by ``gateway.enrolment``.
"""

import hashlib
import json
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from edgesync import jointoken, limits
from edgesync.errors import NotFoundError, UsageError
from edgesync.ids import Digest
from edgesync.jointoken import JoinToken
from edgesync.selectors import check_label
from gateway import fleet
from gateway.store import GatewayStore

DEFAULT_TTL_S: Final = 3600.0
MAX_TTL_S: Final = 90 * 86_400.0
"""A token is a password on paper: longer than this it is found in a drawer."""
MAX_USES: Final = 10_000
_ID_PATTERN = re.compile(r"[a-z0-9*?\[\]!-]{1,63}\Z")
_HARDWARE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


@dataclass(frozen=True)
class CreatedToken:
    id: str
    token: str
    join_command: str
    expires: float
    """Unix seconds."""
    uses: int
    pending: bool
    """Devices that use it wait for ``device accept``."""


def create(
    store: GatewayStore,
    *,
    root_version: int,
    root_sha256: Digest,
    addresses: Sequence[str],
    utc_now: float,
    ttl_s: float = DEFAULT_TTL_S,
    uses: int = 1,
    site: str | None = None,
    labels: Mapping[str, str] | None = None,
    hardware: str | None = None,
    id_pattern: str | None = None,
    auto_accept: bool = False,
) -> CreatedToken:
    """Make a token for ``uses`` machines within ``ttl_s`` seconds. Raises UsageError: a limit is out of range."""
    if not 0 < ttl_s <= MAX_TTL_S:
        raise UsageError(f"--ttl must be between 1s and {MAX_TTL_S / 86_400:.0f}d")
    if not 1 <= uses <= MAX_USES:
        raise UsageError(f"--uses must be from 1 to {MAX_USES}")
    if not addresses:
        raise UsageError("no address of this gateway is known: set advertise in its configuration")
    if hardware is not None and not _HARDWARE.match(hardware):
        raise UsageError(
            f"--hardware {hardware[:80]!a} is not 1 to 63 letters, digits, '.', '_' or '-', the first a letter or digit"
        )
    if id_pattern is not None and not _ID_PATTERN.match(id_pattern):
        raise UsageError(f"--id {id_pattern!a} must be a device id or a pattern such as cam-*")
    given = dict(labels or {})
    if site is not None:
        given["site"] = site
    if len(given) > limits.MAX_LABELS:
        raise UsageError(f"a device has at most {limits.MAX_LABELS} labels")
    for key, value in given.items():
        check_label(key, value)
    here = fleet.load(store)
    token_id, secret = jointoken.new_id(), secrets.token_bytes(jointoken.SECRET_BYTES)
    expires = utc_now + ttl_s
    pending = uses > 1 and not auto_accept
    with store.atomic() as db:
        db.conn.execute(
            "INSERT INTO tokens (id, secret_hash, created, expires, uses, site, labels, hardware, id_pattern, "
            "auto_accept) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                token_id,
                hash_secret(secret),
                utc_now,
                expires,
                uses,
                site,
                json.dumps(given, sort_keys=True),
                hardware,
                id_pattern,
                not pending,
            ),
        )
        store.emit(
            "operator",
            "token.created",
            f"token:{token_id}",
            {"uses": uses, "expires": expires, "labels": given, "pending": pending},
            utc_now=utc_now,
        )
    text = jointoken.encode(
        JoinToken(
            token_id, secret, here.gateway_key, root_version, root_sha256, tuple(addresses[:8])
        )
    )
    # echo is a shell builtin: the token is on no process's command line.
    command = f"echo {shlex.quote(text)} | edgesync agent join --token-file -"
    return CreatedToken(token_id, text, command, expires, uses, pending)


def list_tokens(store: GatewayStore, *, utc_now: float) -> list[dict[str, Any]]:
    """Every token, newest first; the secret is not among what is known of it."""
    rows = store.rows(
        "SELECT t.*, (SELECT COUNT(*) FROM token_uses u WHERE u.token_id = t.id) AS used "
        "FROM tokens t ORDER BY t.created DESC, t.id"
    )
    return [
        {
            "id": row["id"],
            "state": state(row, used=row["used"], utc_now=utc_now),
            "created": row["created"],
            "expires": row["expires"],
            "uses": row["uses"],
            "used": row["used"],
            "labels": json.loads(row["labels"]),
            "hardware": row["hardware"],
            "id_pattern": row["id_pattern"],
            "auto_accept": bool(row["auto_accept"]),
        }
        for row in rows
    ]


def state(row: Mapping[str, Any], *, used: int, utc_now: float) -> str:
    """``active``, or why a new machine cannot use it: ``revoked``, ``expired``, ``used_up``."""
    if row["revoked"] is not None:
        return "revoked"
    if utc_now >= row["expires"]:
        return "expired"
    return "used_up" if used >= row["uses"] else "active"


def revoke(store: GatewayStore, token_id: str, *, utc_now: float) -> None:
    """No machine joins with it any more; those that did stay. Raises NotFoundError."""
    with store.atomic() as db:
        row = store.one("SELECT revoked FROM tokens WHERE id = ?", (token_id,))
        if row is None:
            raise NotFoundError(f"there is no token {token_id!a}: see edgesync token list")
        if row["revoked"] is None:
            db.conn.execute("UPDATE tokens SET revoked = ? WHERE id = ?", (utc_now, token_id))
            store.emit("operator", "token.revoked", f"token:{token_id}", utc_now=utc_now)


def hash_secret(secret: bytes) -> bytes:
    return hashlib.sha256(b"edgesync/1/token\0" + secret).digest()
