"""The daemon on a device: opens the stores, connects the shells to each other, and stops cleanly.

It decides nothing: what may be installed is in ``device.installer``, what is fetched from whom in the cores, what is
believed in ``edgesync.trust``. It starts without network, broker or gateway, and reaches them when they are there.
"""

import asyncio
import contextlib
import functools
import gc
import logging
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from device import joining, role, status, streaming
from device.budget import DeviceBudget
from device.bundle_store import BundleStore
from device.caps import DeviceCaps, leaves_site, own_caps
from device.config import AgentSettings
from device.control import Answer, ControlServer
from device.core.events import GatewayAllowance
from device.discovery import Discovery
from device.executions import Execution, Executions
from device.installer import Installer
from device.joining import Membership
from device.known_peers import KnownPeers
from device.memory import give_back
from device.metadata import Check, Metadata
from device.orders import Orders
from device.outbox import Outbox
from device.reading_rights import ReadingRights
from device.state import StateDatabase
from device.swarm import Swarm
from device.telemetry import Telemetry
from device.trust_store import TrustStore
from edgesync import __version__, config, limits
from edgesync.assignment import Entry
from edgesync.budget import SPENT, Verdict
from edgesync.cli.errors import run as run_command
from edgesync.config import HostPort, parse_host_port
from edgesync.errors import (
    ConfigError,
    EdgeSyncError,
    NotAuthorizedError,
    StorageError,
)
from edgesync.ids import Digest, PeerKey
from edgesync.io import network_watch, systemd
from edgesync.io.mqtt import LinkConfig
from edgesync.storage import datadir
from edgesync.storage.datadir import DataDir
from edgesync.transport.connection import PeerConnection
from edgesync.transport.endpoint import Endpoint, EndpointConfig
from edgesync.wire import mqtt

logger = logging.getLogger(__name__)

PENDING_RETRY_S = 10.0
METADATA_INTERVAL_S = 15 * 60.0
"""How often metadata is asked for where no broker brings it."""
METADATA_RETRY_S = 10.0
WAKE_SPREAD_S = 1.0
KNOWN_PEERS_S = 30.0
BROWSE_EVERY_S = 600.0
BROWSE_S = 10.0
ASSIGNMENT_RETRY_S = 10.0
COALESCE_S = 0.1
ASK_VERSIONS_S = 5.0
LOOP_LAG_LIMIT_S = 10.0
HINDRANCES_LOOK_S = 2.0
START_TIMEOUT_S = 3600.0
T = TypeVar("T")


class Agent:
    def __init__(self, data: DataDir, settings: AgentSettings) -> None:
        self._data = data
        self._settings = settings
        self._stopping = asyncio.Event()
        self._timestamp: bytes | None = None
        self._metadata_due = asyncio.Event()
        self._started = time.time()
        self._notes: dict[str, str] = {}
        self._pending = False
        self._gateway_epoch = 0
        self._asked_versions_at = -ASK_VERSIONS_S
        self._swarm: Swarm
        self._discovery: Discovery | None = None
        self._browse_phase_s = random.uniform(0.0, BROWSE_EVERY_S)  # noqa: S311  # spreads questions
        self._tell_lost: Callable[[Digest, int], None] | None = None

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT. Raises EdgeSyncError: it cannot start, and why."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        self._identity = joining.load_or_make_identity(self._data)
        self._member = Membership.load(self._data)
        async with contextlib.AsyncExitStack() as stack:
            await self._open_stores(stack)
            control = ControlServer(
                self._data.path,
                {
                    "status": self._op_status,
                    "get": self._op_get,
                    "bundle_list": self._op_bundles,
                    "bundle_show": self._op_bundles,
                    "bundle_verify": self._op_bundles,
                    "bundle_remove": self._op_bundles,
                },
            )
            await self._wait_accepted(stack, control)
            if self._stopping.is_set():
                return
            await self._serve(stack, control)

    # --- starting ---------------------------------------------------------------------------------------------------
    async def _open_stores(self, stack: contextlib.AsyncExitStack) -> None:
        in_thread = asyncio.to_thread
        # What a power cut left is hashed before anything else: gigabytes on a slow card take their time.
        systemd.notify(f"EXTEND_TIMEOUT_USEC={START_TIMEOUT_S * 1_000_000:.0f}")
        self._trust_store = await in_thread(TrustStore.open, self._data.path)
        stack.callback(self._trust_store.close)
        self._state = await in_thread(StateDatabase.open, self._data.state_database)
        stack.callback(self._state.close)
        self._store = await in_thread(
            functools.partial(BundleStore.open, self._data.path, self._state, on_lost=self._lost)
        )
        stack.callback(self._store.close)
        self._executions = Executions(self._state)
        self._outbox = Outbox(self._state)
        self._known_peers = KnownPeers(self._state)

    async def _wait_accepted(
        self, stack: contextlib.AsyncExitStack, control: ControlServer
    ) -> None:
        """While the operator has not accepted this device, ask again; the socket answers meanwhile."""
        if self._member.state == "accepted":
            return
        self._pending = True
        await control.start()
        systemd.notify("READY=1", "STATUS=waiting to be accepted by the operator")
        try:
            while self._member.state != "accepted" and not self._stopping.is_set():
                try:
                    self._member = await joining.ask_again(
                        self._data,
                        self._identity,
                        self._member,
                        self._settings.gateway_quic,
                        self._settings.proxies(),
                    )
                    self._notes.pop("join", None)
                except NotAuthorizedError as exc:
                    self._notes["join"] = str(exc)
                except EdgeSyncError as exc:
                    self._notes["join"] = f"the gateway cannot be asked: {exc}"
                if self._member.state != "accepted":
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(PENDING_RETRY_S):
                            await self._stopping.wait()
        finally:
            await control.close()
        self._identity = joining.load_or_make_identity(self._data)
        self._pending = False
        del stack

    async def _serve(self, stack: contextlib.AsyncExitStack, control: ControlServer) -> None:
        settings = self._settings
        self._metadata = Metadata(
            self._trust_store, fetch=self._fetch, executor=self._store.executor
        )
        self._metadata.on_change = self._metadata_changed
        rights = ReadingRights(
            connection=lambda key: self._swarm.source(key),  # noqa: PLW0108 - the swarm is made below
            keys=self._all_assign_keys,
            fleet=self._trust_store.state.fleet_id,
            utc_now=self._trust_store.now,
        )
        self._caps = DeviceCaps(
            device_id=self._member.id,
            site=self._member.labels.get("site", ""),
            own=own_caps(settings.upload_limit, settings.download_limit, settings.time_zone),
            state=self._state,
            in_storage=self._in_storage,
            utc_now=self._trust_store.now,
            background=settings.background,
        )
        self._budget = DeviceBudget(
            settings.budget,
            settings.time_zone,
            state=self._state,
            in_storage=self._in_storage,
            utc_now=self._trust_store.now,
            told=self._budget_told,
        )
        self._swarm = Swarm(
            store=self._store,
            metadata=self._served,
            gateway_key=self._gateway_key,
            gateway_addresses=self._gateway_addresses,
            may_read=rights.may_read,
            obey_caps=self._meet,
            refuses=self._refuses,
            on_versions=self._versions_told,
        )
        try:
            self._endpoint = await Endpoint.open(
                host=settings.listen_quic.host,
                port=settings.listen_quic.port,
                identity=self._identity,
                judge=self._metadata.judge,
                handler=self._swarm,
                config=EndpointConfig(
                    agent=f"edgesync {__version__}",
                    congestion=settings.congestion,
                    background=settings.background,
                    versions=self._versions,
                    proxy=settings.proxies(),
                ),
            )
        except OSError as exc:
            raise ConfigError(
                f"cannot listen on {settings.listen_quic} (UDP): {exc.strerror}: change listen_quic"
            ) from exc
        stack.push_async_callback(self._endpoint.close)
        self._swarm.attach(self._endpoint)
        stack.push_async_callback(self._swarm.close)
        self._installer = Installer(
            store=self._store,
            trust_store=self._trust_store,
            executions=self._executions,
            metadata=self._metadata,
            swarm=self._swarm,
            hardware=self._member.hardware,
            on_change=self._execution_changed,
        )
        stack.push_async_callback(self._installer.close)
        self._orders = Orders(
            accept=self._accept_assignments,
            want=self._installer.want,
            make_room=self._store.release_reserve,
        )
        self._loop = asyncio.get_running_loop()
        self._tell_lost = self._swarm.lost
        self._telemetry = Telemetry(
            device_id=self._member.id,
            gateway_id=self._member.gateway,
            identity=self._identity,
            brokers=lambda: self._member.brokers,
            gateway_keys=self._gateway_keys,
            outbox=self._outbox,
            state=self._mqtt_state,
            progress=self._mqtt_progress,
            listener=self,
            in_storage=self._in_storage,
            utc_now=self._trust_store.now,
            config=LinkConfig(max_backoff_s=settings.reconnect_max),
            doors=self._mqtt_doors,
            proxies=settings.proxies(),
        )
        await control.start()
        stack.push_async_callback(control.close)
        self._resume_assignments()
        tasks = [
            asyncio.ensure_future(work)
            for work in (
                self._telemetry.run(),
                self._keep_metadata(),
                self._keep_assignments(),
                self._caps.run(),
                self._budget.run(),
                self._tell_hindrances(),
                self._watchdog(),
                self._keep_known_peers(),
                network_watch.follow(self._network_changed),
            )
        ]
        if settings.mdns:
            self._discovery = Discovery(
                device_id=self._member.id,
                key=self._identity.key,
                port=self._endpoint.port,
                interface=settings.interface,
                versions=self._versions,
                wanted=self._looks_for_peers,
                on_candidate=self._swarm.candidate,
            )
            tasks.append(asyncio.ensure_future(self._discovery.run()))
        stopping = asyncio.ensure_future(self._stopping.wait())
        systemd.notify("READY=1", f"STATUS=serving on UDP port {self._endpoint.port}")
        logger.info("agent %s is up on UDP port %d", self._member.id, self._endpoint.port)
        try:
            await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            systemd.notify("STOPPING=1")
            await self._telemetry.goodbye()
            for task in (stopping, *tasks):
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for result in ended:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    def _resume_assignments(self) -> None:
        accepted = self._trust_store.assignments()
        if accepted is not None:
            self._installer.want(accepted.entries)

    # --- metadata ---------------------------------------------------------------------------------------------------
    async def _keep_metadata(self) -> None:
        """Take offered timestamps, one at a time, and ask around where nobody offers any."""
        while True:
            pause = METADATA_RETRY_S if self._timestamp is not None else METADATA_INTERVAL_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._metadata_due.wait()
            # Retained files arrive in any order: what is already on its way need not be fetched.
            await asyncio.sleep(COALESCE_S)
            self._metadata_due.clear()
            if self._timestamp is not None:
                offered, self._timestamp = self._timestamp, None
                await self._metadata.offer(offered)
                if self._metadata.incomplete:
                    self._timestamp = self._timestamp or offered
            else:
                await self._metadata.refresh()
            await self._save_trusted_time()

    async def _save_trusted_time(self) -> None:
        # Looked at each METADATA_INTERVAL_S and stored hourly: what is lost at a power cut is bounded by that.
        try:
            await self._in_storage(self._trust_store.save_time)
        except StorageError as exc:
            logger.error("trusted time: %s", exc)  # noqa: TRY400 - the sentence says it all

    async def _metadata_changed(self) -> None:
        await self._endpoint.rejudge()
        self._installer.look_again()
        self._telemetry.state_changed()

    async def _fetch(self, name: str, max_bytes: int, check: Check) -> bytes:
        return await self._swarm.fetch_any(name, max_bytes, check)

    def _looks_for_peers(self) -> bool:
        """Where something is wanted; and now and then while the gateway is away, to know who is there by then."""
        if self._swarm.wants_peers():
            return True
        if self._telemetry.link.connected or self._swarm.gateway_carrier:
            return False
        return (time.monotonic() + self._browse_phase_s) % BROWSE_EVERY_S < BROWSE_S

    async def _keep_known_peers(self) -> None:
        """Written only where it changed: a card wears out."""
        known = await self._in_storage(self._known_peers.load)
        self._swarm.recall_peers(known)
        while True:
            await asyncio.sleep(KNOWN_PEERS_S)
            now = self._swarm.known_peers()
            if now != known:
                try:
                    await self._in_storage(self._known_peers.save, now)
                except StorageError as exc:
                    logger.error("known peers: %s", exc)  # noqa: TRY400 - the sentence says it all
                known = now

    def _network_changed(self) -> None:
        """A cable, an address or a route is back: nobody waits out a pause that began without it."""
        if self._discovery is not None:
            self._discovery.interfaces_changed()
        # A whole site may see its switch come back at once.
        wait_s = random.uniform(0.0, WAKE_SPREAD_S)  # noqa: S311  # spreads dials, guards nothing
        loop = asyncio.get_running_loop()
        loop.call_later(wait_s, self._swarm.network_changed)
        if not self._telemetry.link.connected:
            loop.call_later(wait_s, self._telemetry.link.kick)

    def _versions(self) -> tuple[int, int]:
        view = self._metadata.trusted
        return view.root_version, view.timestamp_version

    def _versions_told(self, peer: PeerKey, root: int, timestamp: int) -> None:
        """A peer or the gateway has other metadata; newer is worth asking for, whoever says so is not believed."""
        if peer == self._gateway_key() and not self._telemetry.link.connected:
            self._telemetry.link.kick()  # the gateway is there: its broker may be too
        now = time.monotonic()
        # A member that keeps claiming newer versions costs one question in a while.
        if (root, timestamp) > self._versions() and now - self._asked_versions_at >= ASK_VERSIONS_S:
            self._asked_versions_at = now
            self._metadata_due.set()

    # --- what the broker brings (Listener) ---------------------------------------------------------------------------
    async def timestamp_offered(self, data: bytes) -> None:
        self._timestamp = data
        self._metadata_due.set()

    def file_offered(self, name: str, data: bytes) -> None:
        self._metadata.remember(name, data)
        if self._timestamp is not None:
            self._metadata_due.set()
        self._installer.look_again()

    async def assignment_offered(self, data: bytes) -> None:
        """Raises EdgeSyncError: refused, or not stored; ``assignment_refused`` then keeps it for another try."""
        await self._orders.offered(data)

    def assignment_refused(self, data: bytes, error: EdgeSyncError) -> None:
        self._orders.refused(data, error)

    async def _accept_assignments(self, data: bytes) -> tuple[Entry, ...]:
        accepted = await self._in_storage(
            functools.partial(
                self._trust_store.accept_assignments,
                data,
                keys=self._metadata.trusted.assign_keys(self._member.region),
                device_id=self._member.id,
                device_key=self._identity.key,
            )
        )
        return accepted.entries

    async def _keep_assignments(self) -> None:
        while True:
            await asyncio.sleep(ASSIGNMENT_RETRY_S)
            await self._orders.try_again()

    async def caps_told(self, message: mqtt.Caps) -> None:
        await self._caps.heard(message)

    def peers_told(self, peers: mqtt.Peers) -> None:
        self._caps.site_told(peers.site)
        for peer in peers.peers:
            for address in peer.addresses:
                self._swarm.told_peer(PeerKey(peer.key), address)

    def presence_told(self, presence: mqtt.Presence) -> None:
        if presence.online:
            if presence.quic and not self._settings.gateway_quic:
                self._member.gateway_quic = list(presence.quic)
            restarted = self._gateway_epoch not in {0, presence.epoch}
            self._gateway_epoch = presence.epoch
            self._swarm.gateway_seen(restarted=restarted)
        if presence.timestamp_version > self._metadata.trusted.timestamp_version:
            self._metadata_due.set()

    # --- who is who -------------------------------------------------------------------------------------------------
    def _gateway_keys(self) -> list[PeerKey]:
        keys = [
            PeerKey(entry.key) for entry in self._metadata.trusted.gateways(self._member.region)
        ]
        return keys or [self._member.gateway_key]

    def _gateway_key(self) -> PeerKey:
        for entry in self._metadata.trusted.gateways(self._member.region):
            if entry.id == self._member.gateway:
                return PeerKey(entry.key)
        return self._member.gateway_key

    def _gateway_addresses(self) -> list[str]:
        if self._settings.gateway_quic is not None:
            return [str(self._settings.gateway_quic)]
        return self._member.gateway_quic

    def _mqtt_doors(self) -> list[HostPort]:
        """The gateway's TLS ports, which pass MQTT on."""
        return [parse_host_port(text, default_port=7443) for text in self._gateway_addresses()[:2]]

    def _served(self, name: str) -> bytes | None:
        """What a peer may fetch by name: metadata, and this device's own assignment set."""
        if name == f"assign/{self._member.id}":
            return self._trust_store.assignment_envelope()
        return self._metadata.served(name)

    def _all_assign_keys(self) -> list[PeerKey]:
        return [PeerKey(entry.assign_key) for entry in self._metadata.trusted.gateways()]

    # --- what the way out costs ---------------------------------------------------------------------------------------
    def _meet(self, conn: PeerConnection) -> None:
        self._caps.obey(conn)
        if leaves_site(conn):
            self._budget.watch(conn)

    def _refuses(self, conn: PeerConnection) -> str:
        """Peers on other networks are left alone while the budget is spent; the gateway's orders still come."""
        if conn.peer.role == "gateway" or not self._budget.is_spent or not leaves_site(conn):
            return ""
        return self._budget.verdict().reason

    async def _tell_hindrances(self) -> None:
        """The gateway hears soon when a transfer begins or ceases to wait for a budget, and of blocked UDP."""
        told = {""}
        while True:
            await asyncio.sleep(HINDRANCES_LOOK_S)
            rows = self._rows() if self._installer.rows else []
            found = {row.reason for row in rows if not row.ended and SPENT in row.reason}
            found.add(self._swarm.carrier_problem())
            if found != told:
                told = found
                self._telemetry.state_changed()

    def _budget_told(self, verdict: Verdict) -> None:
        self._swarm.set_allowance(GatewayAllowance(verdict.left_bytes, verdict.reason))

    # --- telling ----------------------------------------------------------------------------------------------------
    async def _execution_changed(self, row: Execution, news: bool) -> None:
        self._telemetry.state_changed()
        if not news or not row.assignment_id:
            return
        counters = self._counters(row.digest)
        report = mqtt.Report(
            device=self._member.id,
            key=self._identity.key,
            epoch=0,
            sequence=0,
            issued=time.time(),
            kind=row.kind,  # type: ignore[arg-type]  # one of the three: it came from a parsed manifest
            name=row.name,
            version=row.version,
            digest=row.digest,
            assignment=row.assignment_id,
            status=row.status,  # type: ignore[arg-type]
            step=row.step,  # type: ignore[arg-type]
            reason=row.reason[:200],
            payload_bytes=row.payload_bytes,
            bytes_from_gateway=counters.bytes_from_gateway,
            bytes_from_peers=counters.bytes_from_peers,
            bytes_local=counters.bytes_local,
            bytes_import=counters.bytes_import,
            bytes_sent=counters.bytes_sent,
            pieces_total=row.pieces_total,
            pieces_have=row.pieces_have,
            pieces_rejected=counters.pieces_rejected,
            resumes=counters.resumes,
            duration_s=max(0.0, time.time() - row.started),
        )
        try:
            await self._in_storage(self._outbox.add, report)
        except StorageError:
            logger.exception("a report could not be kept")
        self._telemetry.report_added()

    def _mqtt_state(self) -> mqtt.State:
        view = self._metadata.trusted
        reports = self._outbox.last_size
        rows = self._rows()[::-1]  # what began last is what must not be left out
        waiting = next((row.reason for row in reversed(rows) if row.reason and not row.ended), "")
        return mqtt.State(
            device=self._member.id,
            key=self._identity.key,
            epoch=0,
            sequence=0,
            online=True,
            agent=__version__,
            listen_port=self._endpoint.port,
            addresses=_own_addresses(self._settings.interface, self._endpoint.port),
            hardware=self._member.hardware,
            bundles=[
                mqtt.HeldBundle(
                    kind=row.kind,  # type: ignore[arg-type]
                    name=row.name,
                    version=row.version,
                    digest=row.digest,
                    state=row.status,
                    reason=row.reason[:200],
                    pieces_have=row.pieces_have,
                    pieces_total=row.pieces_total,
                )
                for row in rows[: limits.MAX_STATE_BUNDLES]
            ],
            bundles_omitted=max(0, len(rows) - limits.MAX_STATE_BUNDLES),
            waiting=waiting[:200],
            root_version=view.root_version,
            timestamp_version=view.timestamp_version,
            assignment_sequence=self._trust_store.assignment_sequence,
            outbox=reports.waiting,
            reports_lost=reports.lost,
            udp_blocked=bool(self._swarm.carrier_problem()),
        )

    def _mqtt_progress(self) -> mqtt.Progress | None:
        active = [row for row in self._rows() if row.status == "in_progress"][:4]
        if not active:
            return None
        transfers = []
        for row in active:
            counters = self._counters(row.digest)
            transfers.append(
                mqtt.TransferProgress(
                    digest=row.digest,
                    pieces_have=row.pieces_have,
                    pieces_total=row.pieces_total,
                    bytes_from_gateway=counters.bytes_from_gateway,
                    bytes_from_peers=counters.bytes_from_peers,
                    bytes_local=counters.bytes_local,
                    bytes_sent=counters.bytes_sent,
                )
            )
        return mqtt.Progress(device=self._member.id, transfers=transfers)

    def _rows(self) -> list[Execution]:
        """Executions with the pieces each has by now."""
        rows = sorted(self._installer.rows.values(), key=lambda row: (row.started, row.name))
        for row in rows:
            bundle = self._store.get(row.digest)
            if bundle is not None:
                row.pieces_have = bundle.have.count
            if row.status == "in_progress" and row.step == "downloading":
                row.reason = self._swarm.waiting_reason(row.digest)
        return rows

    def _counters(self, digest: Digest) -> Any:
        bundle = self._store.get(digest)
        return bundle.counters if bundle is not None else self._state.counters(digest)

    # --- the local socket -------------------------------------------------------------------------------------------
    async def _op_status(self, _request: dict[str, Any]) -> AsyncIterator[Answer | bytes]:
        yield self._status()

    def _status(self) -> Answer:
        problems = list(self._notes.values()) + self._store.problems()
        problems += self._trust_store.problems
        if lost := self._outbox.last_size.lost:
            problems.append(
                f"{lost} results were dropped before the gateway had them: it was not heard of for too long"
            )
        if not self._trust_store.clock_is_believed():
            problems.append(
                "the clock of this device contradicts signed time and is not used: new assignments may have to wait"
            )
        if self._pending:
            return status.build(
                device_id=self._member.id,
                gateway={
                    "id": self._member.gateway,
                    "connected": False,
                    "last_seen": None,
                    "waiting": f"to be accepted: on the gateway run edgesync device accept {self._member.id}",
                },
                peers=[],
                executions=self._executions.all(),
                counters={},
                metadata=status.metadata_facts(self._trust_store.state.view),
                problems=problems,
                running=True,
            )
        problems += self._endpoint.warnings()
        link = self._telemetry.link.status()
        problems += filter(None, (self._orders.problem, self._metadata.problem))
        problems += filter(None, (self._swarm.carrier_problem(), link.detour))
        problems += [str(problem) for problem in self._metadata.trusted.problems]
        problems += self._caps.problems
        problems += filter(None, (self._budget.problem,))
        rows = self._rows()
        return status.build(
            device_id=self._member.id,
            gateway={
                "id": self._member.gateway,
                "connected": link.connected,
                "last_seen": self._telemetry.last_seen,
                "broker": link.broker,
                "detail": link.last_error,
                "carrier": self._swarm.gateway_carrier,
                "proxy": self._swarm.gateway_proxy,
            },
            peers=self._swarm.peers(),
            executions=rows,
            counters={row.digest: self._counters(row.digest) for row in rows},
            metadata=status.metadata_facts(self._metadata.trusted),
            caps=self._caps.rows(),
            background=self._settings.background,
            budget=self._budget.facts(),
            problems=problems,
            running=True,
        )

    async def _op_get(self, request: dict[str, Any]) -> AsyncIterator[Answer | bytes]:
        name, version = str(request.get("name")), request.get("version")
        work = asyncio.ensure_future(
            self._installer.fetch(name, version if isinstance(version, str) else None)
        )
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=0.5)
                for row in self._rows():
                    if row.name == name and row.status == "in_progress":
                        yield {
                            "pieces_have": row.pieces_have,
                            "pieces_total": row.pieces_total,
                            "payload_bytes": row.payload_bytes,
                            "reason": row.reason,
                        }
            digest = work.result()
        finally:
            work.cancel()
        async for part in streaming.tree(self._store, digest):
            yield part

    async def _op_bundles(self, request: dict[str, Any]) -> AsyncIterator[Answer | bytes]:
        work = functools.partial(
            role.perform,
            self._store,
            request,
            assigned=self._installer.is_assigned,
            fetching=self._installer.is_fetching,
        )
        if request["op"] == "bundle_remove":
            # What begins and activates bundles runs in this one thread: nothing of it comes between the guards and
            # the removal. A verification reads for minutes and must not hold it up.
            answer = await self._in_storage(work)
            self._installer.removed(answer["id"])
            self._telemetry.state_changed()
        else:
            answer = await asyncio.to_thread(work)
        yield answer
        if answer.get("paths") or answer.get("bad"):
            for info in self._store.bundles():
                if (info.name, info.version) == (answer["name"], answer["version"]):
                    self._installer.damaged(info.digest)
        self._installer.look_again()

    # --- housekeeping -----------------------------------------------------------------------------------------------
    def _lost(self, digest: Digest, piece: int) -> None:
        """A piece on disk is no longer what was installed; called from the thread that noticed."""
        logger.warning("piece %d of %s on disk was changed by something else", piece, digest[:12])
        if self._tell_lost is not None:
            self._tell_lost(digest, piece)
            self._loop.call_soon_threadsafe(self._installer.damaged, digest)

    async def _watchdog(self) -> None:
        """Feed the supervisor only while the loop turns and the database answers."""
        interval = systemd.watchdog_interval_s() or 30.0
        while True:
            before = time.monotonic()
            await asyncio.sleep(interval)
            lag = time.monotonic() - before - interval
            try:
                # Not in the storage thread: an activation may keep that busy for minutes.
                async with asyncio.timeout(LOOP_LAG_LIMIT_S):
                    await asyncio.to_thread(self._state.bundles)
            except (StorageError, TimeoutError):
                logger.exception("the database does not answer")
                continue
            if lag < LOOP_LAG_LIMIT_S:
                systemd.notify("WATCHDOG=1")

    async def _in_storage(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._store.executor, function, *arguments
        )


def _own_addresses(interface: str, port: int) -> list[str]:
    import ifaddr

    found = [
        str(ip.ip)
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if ip.is_IPv4 and interface in {"", adapter.nice_name, ip.ip}
    ]
    return [f"{ip}:{port}" for ip in found if interface or not ip.startswith("127.")][:8]


def main() -> int:
    """Entry of ``python -m device``: settings come from the file and the environment."""
    logging.basicConfig(
        level=os.environ.get("EDGESYNC_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )

    def start() -> None:
        # What was imported stays; the collector need not look at it again, and comes sooner to what a transfer leaves.
        give_back()
        gc.freeze()
        data = DataDir.open(datadir.choose_path("agent", None), "agent")
        settings = config.load(AgentSettings, data.config).values
        with data.lock():
            asyncio.run(Agent(data, settings).run())

    return run_command(start)
