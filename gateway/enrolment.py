"""Joining: which machines become members, under which id, and what they are told.

It decides on a proven JOIN (the asker holds the private half of the key it names) and records the decision; it opens no
sockets. The seeder calls it in the writer thread. Rules:

* a token that is unknown and one whose secret is wrong look the same from outside;
* the same token with the same key gets the same answer again, however often and even when the token has since expired
  or been used up: a lost reply burns nothing;
* an id belongs to the key that joined under it first; ids that could be taken for a gateway or a bridge are refused;
* a token of one use, or one made with ``--auto-accept``, makes a member at once; else the device waits as *pending*;
* every decision is an event, but strangers cannot fill the log: refusals above a rate are only counted.
"""

import fnmatch
import hmac
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from edgesync import envelope
from edgesync.errors import VerificationError
from edgesync.ids import DeviceId, PeerKey
from edgesync.wire.messages import Join, Joined, JoinRefused, join_payload
from gateway import fleet
from gateway.service import tokens
from gateway.service.devices import Certify
from gateway.store import GatewayStore

REFUSALS_PER_MINUTE: Final = 30
"""Per source address, then it is told to wait: guessing is refused, a site that joins a hundred devices is not."""
JOINS_PER_MINUTE: Final = 600
"""Over all addresses: bounds what joining may cost the writer thread."""
MAX_ADDRESSES: Final = 4096
"""Addresses remembered for the rate; beyond it the oldest are forgotten."""
LOGGED_REFUSALS_PER_MINUTE: Final = 30

Reason = Literal[
    "unknown_token", "expired", "used_up", "revoked", "id_refused", "id_taken", "busy", "rejected"
]


@dataclass(frozen=True)
class Places:
    """Where a member finds this gateway."""

    quic: Sequence[str]
    brokers: Sequence[str]
    root_version: int


class RateLimit:
    """Counts in one-minute windows, refusals per address and joins over all, within bounded memory."""

    def __init__(self) -> None:
        self._window = -1
        self._refusals: dict[str, int] = {}
        self._total = 0
        self._logged = 0

    def allow(self, address: str, *, now: float) -> bool:
        self._turn(now)
        if self._refusals.get(address, 0) >= REFUSALS_PER_MINUTE or self._total >= JOINS_PER_MINUTE:
            return False
        self._total += 1
        return True

    def refused(self, address: str, *, now: float) -> None:
        self._turn(now)
        count = self._refusals.pop(address, 0) + 1
        while len(self._refusals) >= MAX_ADDRESSES:
            self._refusals.pop(next(iter(self._refusals)))
        self._refusals[address] = count

    def log_refusal(self, *, now: float) -> bool:
        self._turn(now)
        self._logged += 1
        return self._logged <= LOGGED_REFUSALS_PER_MINUTE

    def _turn(self, now: float) -> None:
        window = int(now // 60)
        if window != self._window:
            self._window, self._refusals, self._total, self._logged = window, {}, 0, 0


class Enrolment:
    def __init__(
        self,
        store: GatewayStore,
        certify: Certify,
        *,
        on_member: Callable[[DeviceId], None],
        gateway_ids: Collection[str] = (),
    ) -> None:
        """``on_member`` is called inside the transaction that makes a device a member."""
        self._store = store
        self._certify = certify
        self._on_member = on_member
        self._gateway_ids = frozenset(gateway_ids)
        self._rate = RateLimit()

    def join(
        self,
        join: Join,
        *,
        address: str,
        server_certificate_sha256: bytes,
        places: Places,
        now: float,
        utc_now: float,
    ) -> Joined | JoinRefused:
        """Answer one JOIN that came from ``address`` (host without port)."""
        if not self._rate.allow(address, now=now):
            return self._refused(
                join, "busy", "too many attempts: try again in a minute", address, now, utc_now
            )
        payload = join_payload(
            token_id=join.token_id,
            device_id=join.device_id,
            server_certificate_sha256=server_certificate_sha256,
        )
        key = PeerKey(join.public_key.hex())
        try:
            envelope.verify_raw("join", payload, join.signature, key)
        except VerificationError:
            return self._refused(
                join, "unknown_token", "the signature is wrong", address, now, utc_now
            )
        with self._store.atomic():
            answer = self._decide(join, key, address, places, utc_now)
        if isinstance(answer, JoinRefused):
            return self._refused(join, answer.reason, answer.text, address, now, utc_now)
        return answer

    def _decide(
        self, join: Join, key: PeerKey, address: str, places: Places, utc_now: float
    ) -> Joined | JoinRefused:
        token = self._store.one("SELECT * FROM tokens WHERE id = ?", (join.token_id,))
        # Compared even when there is no such token: the time taken must not tell which half was wrong.
        expected = token["secret_hash"] if token is not None else bytes(32)
        if not hmac.compare_digest(expected, tokens.hash_secret(join.secret)) or token is None:
            return JoinRefused(reason="unknown_token", text="this gateway knows no such token")
        if token["revoked"] is not None:
            return JoinRefused(reason="revoked", text="the token was revoked")
        device = self._store.one("SELECT * FROM devices WHERE key = ?", (key,))
        if device is not None and device["id"] != join.device_id:
            return JoinRefused(
                reason="id_refused", text=f"this key is registered as {device['id']}"
            )
        if device is not None and device["state"] == "rejected":
            return JoinRefused(reason="rejected", text="an operator rejected this device")
        used = self._store.one(
            "SELECT 1 AS yes FROM token_uses WHERE token_id = ? AND key = ?", (join.token_id, key)
        )
        if used is None:
            refusal = self._check_new_use(join, token, device, utc_now)
            if refusal is not None:
                return refusal
            self._record(join, key, token, device, address, utc_now)
            device = self._store.one("SELECT * FROM devices WHERE key = ?", (key,))
        if device is None:
            return JoinRefused(
                reason="used_up", text="the device this token made is no longer registered"
            )
        return self._answer(device, places)

    def _check_new_use(
        self, join: Join, token: Mapping[str, Any], device: Mapping[str, Any] | None, utc_now: float
    ) -> JoinRefused | None:
        count = self._store.one(
            "SELECT COUNT(*) AS n FROM token_uses WHERE token_id = ?", (join.token_id,)
        )
        assert count is not None
        match tokens.state(token, used=count["n"], utc_now=utc_now):
            case "expired":
                return JoinRefused(reason="expired", text="the token has expired: make a new one")
            case "used_up":
                return JoinRefused(
                    reason="used_up", text="the token was used by another machine: make a new one"
                )
            case _:
                pass
        pattern = token["id_pattern"]
        if pattern is not None and not fnmatch.fnmatchcase(join.device_id, pattern):
            return JoinRefused(reason="id_refused", text=f"the token is for ids like {pattern}")
        if join.device_id in self._gateway_ids or join.device_id.startswith(
            fleet.RESERVED_PREFIXES
        ):
            return JoinRefused(reason="id_refused", text="ids of gateways and bridges are reserved")
        if device is None and self._store.one(
            "SELECT 1 AS yes FROM devices WHERE id = ?", (join.device_id,)
        ):
            return JoinRefused(
                reason="id_taken", text="another machine has this id: choose one with --id"
            )
        return None

    def _record(
        self,
        join: Join,
        key: PeerKey,
        token: Mapping[str, Any],
        device: Mapping[str, Any] | None,
        address: str,
        utc_now: float,
    ) -> None:
        store, subject = self._store, f"device:{join.device_id}"
        facts = {"token": join.token_id, "key": key, "address": address, "agent": join.agent}
        member = bool(token["auto_accept"])
        with store.atomic() as db:
            if device is not None:
                # The machine lost its trust store, or its operator gave it a second token: same key, same place.
                member = member and device["state"] != "accepted"
                db.conn.execute(
                    "UPDATE devices SET agent_version = ? WHERE id = ?",
                    (join.agent, join.device_id),
                )
                store.emit(
                    f"device:{join.device_id}", "device.rejoined", subject, facts, utc_now=utc_now
                )
            else:
                db.conn.execute(
                    "INSERT INTO devices (id, key, region, labels, hardware, state, token_id, joined, agent_version, "
                    "address) VALUES (?, ?, ?, ?, ?, 'pending', ?, ?, ?, ?)",
                    (
                        join.device_id,
                        key,
                        fleet.load(store).region,
                        token["labels"],
                        token["hardware"] or join.hardware,
                        join.token_id,
                        utc_now,
                        join.agent,
                        address,
                    ),
                )
                kind = "device.joined" if member else "device.pending"
                store.emit(f"device:{join.device_id}", kind, subject, facts, utc_now=utc_now)
            db.conn.execute(
                "INSERT INTO token_uses (token_id, key, device_id, ts) VALUES (?, ?, ?, ?)",
                (join.token_id, key, join.device_id, utc_now),
            )
            if member:
                device_id = DeviceId(join.device_id)
                db.conn.execute(
                    "UPDATE devices SET state = 'accepted', certificate = COALESCE(certificate, ?) WHERE id = ?",
                    (self._certify(device_id, join.public_key), device_id),
                )
                self._on_member(device_id)

    def _answer(self, device: Mapping[str, Any], places: Places) -> Joined:
        here = fleet.load(self._store)
        accepted = device["state"] == "accepted"
        return Joined(
            state="accepted" if accepted else "pending",
            device_id=device["id"],
            certificate=device["certificate"] if accepted else b"",
            gateway_id=here.gateway_id,
            region=here.region,
            labels=json.loads(device["labels"]),
            hardware=device["hardware"],
            gateway_quic=list(places.quic[:8]),
            brokers=list(places.brokers[:8]),
            root_version=places.root_version,
        )

    def _refused(
        self, join: Join, reason: Reason, text: str, address: str, now: float, utc_now: float
    ) -> JoinRefused:
        if reason != "busy":
            self._rate.refused(address, now=now)
        if self._rate.log_refusal(now=now):
            self._store.emit(
                "gateway",
                "join.refused",
                f"token:{join.token_id}",
                {"reason": reason, "address": address, "device": join.device_id},
                utc_now=utc_now,
            )
        return JoinRefused(reason=reason, text=text[:200])
