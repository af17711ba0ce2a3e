"""Brings the bundles an assignment set names, and those somebody asked for, onto this device.

For each bundle one task: check it against signed metadata, fetch its manifest, stage it, take what older versions hold,
let the swarm fetch the rest, activate it, say what became of it. What may happen next is decided in
``device.core.install``; blocking work runs in the store's thread. A failed step leaves the version before as it was.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeVar

from device.bundle_store import BundleStore, HeldBundle, StagedBundle
from device.core.install import State, may_follow, state_of
from device.executions import Execution, Executions
from device.memory import give_back
from device.metadata import Metadata
from device.trust_store import TrustStore
from edgesync import manifest as manifests
from edgesync.assignment import Entry
from edgesync.errors import (
    DiskFullError,
    EdgeSyncError,
    NotAuthorizedError,
    NotFoundError,
    StorageError,
    TransportError,
    TreeDamagedError,
    VerificationError,
)
from edgesync.ids import BundleName, Digest, Version
from edgesync.manifest import Manifest
from edgesync.trust import BundleTarget, check_manifest

logger = logging.getLogger(__name__)

PARALLEL_BUNDLES = 2
"""Bundles fetched at a time; more would only share the same link and double the memory."""
RETRY_S = 5.0
REPAIR_INTERVAL_S = 60.0
"""An application that goes on changing its bundle's files is set right once in this time, not without end."""
DISK_FULL_RETRY_S = 30.0
T = TypeVar("T")


class Fetcher(Protocol):
    """The swarm, as far as an installation needs it."""

    async def fetch_bundle(self, staged: StagedBundle) -> None:
        """Return once every piece is held. Raises StorageError; never gives up for the network's sake."""
        ...

    def waiting_reason(self, digest: Digest) -> str: ...


class Installer:
    def __init__(
        self,
        *,
        store: BundleStore,
        trust_store: TrustStore,
        executions: Executions,
        metadata: Metadata,
        swarm: Fetcher,
        hardware: str,
        on_change: Callable[[Execution, bool], Awaitable[None]],
    ) -> None:
        """``on_change`` is told each change of a row, and whether the gateway should hear of it."""
        self._store = store
        self._trust_store = trust_store
        self._executions = executions
        self._metadata = metadata
        self._swarm = swarm
        self._hardware = hardware
        self._on_change = on_change
        self._entries: dict[BundleName, Entry] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(PARALLEL_BUNDLES)
        self.rows: dict[Digest, Execution] = {row.digest: row for row in executions.all()}
        self._settled: dict[Digest, str] = {
            row.digest: row.assignment_id for row in self.rows.values() if row.status == "succeeded"
        }
        """The assignment that ended well; bringing the bundle again after damage is no second end of it."""
        self._reported: dict[Digest, tuple[str, str, str, str]] = {}
        self._wake: dict[tuple[str, str], asyncio.Event] = {}
        self._told: dict[Digest, State] = {}
        self._working_on: dict[tuple[str, str], Entry] = {}
        self._downloads: dict[Digest, _Shared] = {}
        self._repaired_at: dict[Digest, float] = {}
        self._closing = False

    # --- what shall be here -----------------------------------------------------------------------------------------
    def want(self, entries: Iterable[Entry]) -> None:
        """Make the assignment set's entries the ones that count: start what is new, stop what is gone."""
        self._entries = {BundleName(entry.name): entry for entry in entries}
        for key, task in list(self._tasks.items()):
            if self._entry(key) != self._working_on[key] and not self._is_activating(*key):
                task.cancel()  # what is wanted in its place starts when it has ended
        for entry in self._entries.values():
            key = (entry.name, entry.version)
            if key in self._tasks:
                self._wake[key].set()
            else:
                self._start(entry)

    def _entry(self, key: tuple[str, str]) -> Entry | None:
        entry = self._entries.get(BundleName(key[0]))
        return entry if entry is not None and entry.version == key[1] else None

    def damaged(self, digest: Digest) -> None:
        """Something changed an installed tree: bring the bundle again if it is wanted, at most once in a while."""
        now = time.monotonic()
        if now - self._repaired_at.get(digest, -REPAIR_INTERVAL_S) < REPAIR_INTERVAL_S:
            return
        for entry in self._entries.values():
            if entry.target_hash == digest and (entry.name, entry.version) not in self._tasks:
                self._repaired_at[digest] = now
                self._start(entry)

    def is_fetching(self, digest: Digest) -> bool:
        """Whether pieces of it come, or it is being installed; safe from any thread."""
        # Copied before it is walked through: the loop may start and end work meanwhile.
        working_on = list(self._working_on.values())
        return digest in self._downloads or any(entry.target_hash == digest for entry in working_on)

    def _is_activating(self, name: str, version: str) -> bool:
        """Whether it is too late to cancel: what switches trees is settled first."""
        return any(
            (row.name, row.version, row.status) == (name, version, "in_progress")
            and row.step in {"installing", "verifying"}
            for row in self.rows.values()
        )

    def removed(self, digest: Digest) -> None:
        """The bundle is not on this device any more, and its execution was forgotten with it."""
        for known in (self.rows, self._told, self._settled, self._reported):
            known.pop(digest, None)

    def look_again(self) -> None:
        """Metadata or disk changed: whoever waits tries anew."""
        for event in self._wake.values():
            event.set()

    def is_assigned(self, name: str, version: str) -> bool:
        entry = self._entries.get(BundleName(name))
        return entry is not None and entry.version == version

    async def fetch(self, name: str, version: str | None) -> Digest:
        """Hold a bundle that somebody on this machine asked for; returns once it is whole.

        Raises NotFoundError: the metadata this device has lists no such bundle. Raises EdgeSyncError: why not.
        """
        trusted = self._metadata.trusted
        target = trusted.find(name, version)
        if target is None:
            await self._metadata.refresh()
            trusted = self._metadata.trusted
            target = trusted.find(name, version)
        if target is None:
            what = name if version is None else f"{name}@{version}"
            raise NotFoundError(f"{what} is not among the bundles this device knows of")
        held = self._store.held(target.digest)
        if held is None or not held.complete:
            await self._bring(target, install=False, assignment_id="")
        return target.digest

    async def close(self) -> None:
        self._closing = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # --- one assigned bundle ----------------------------------------------------------------------------------------
    def _start(self, entry: Entry) -> None:
        key = (entry.name, entry.version)
        self._wake[key] = asyncio.Event()
        self._working_on[key] = entry
        task = asyncio.ensure_future(self._assigned(entry))
        self._tasks[key] = task

        def ended(done: asyncio.Task[None]) -> None:
            del self._tasks[key], self._wake[key], self._working_on[key]
            if not done.cancelled() and done.exception() is not None:
                logger.error("installing %s@%s broke off", *key, exc_info=done.exception())
            wanted = self._entry(key)
            if done.cancelled() and wanted is not None and not self._closing:
                self._start(wanted)

        task.add_done_callback(ended)

    async def _assigned(self, entry: Entry) -> None:
        """Work on one entry until it ended, waiting and retrying for as long as it is assigned."""
        key = (entry.name, entry.version)
        try:
            while True:
                try:
                    self._wake[key].clear()
                    await self._once(entry)
                except _WaitError as wait:
                    if self._settled.get(Digest(entry.target_hash)) != entry.assignment_id:
                        await self._say(entry, "queued", reason=str(wait))
                    await self._pause(key, wait.seconds)
                except DiskFullError as exc:
                    await self._say(entry, "in_progress", step="downloading", reason=str(exc))
                    await self._pause(key, DISK_FULL_RETRY_S)
                except (TransportError, NotFoundError) as exc:
                    # Also "not found": who was asked does not have the manifest, somebody else will.
                    await self._say(
                        entry, "in_progress", step="downloading", reason=f"waiting: {exc}"
                    )
                    await self._pause(key, RETRY_S)
                except TreeDamagedError as exc:
                    logger.warning("%s@%s: %s", *key, exc)
                    await self._pause(key, 0.1)
                except VerificationError as exc:
                    await self._say(entry, "rejected", reason=str(exc))
                    return
                except EdgeSyncError as exc:
                    await self._say(entry, "failed", reason=str(exc))
                    return
                except Exception as exc:
                    # A supervisor's last resort: one bundle's surprise must not end the others', nor stay unsaid.
                    logger.exception("installing %s@%s met something unexpected", *key)
                    reason = f"an internal error, tried again: {exc!r}"
                    await self._say(entry, "in_progress", step="downloading", reason=reason)
                    await self._pause(key, DISK_FULL_RETRY_S)
                else:
                    return
        except asyncio.CancelledError:
            if self._entry(key) is None and not self._closing:
                await asyncio.shield(self._cancel(entry))
            raise

    async def _cancel(self, entry: Entry) -> None:
        staged = self._store.staged(Digest(entry.target_hash))
        if staged is not None and self._store.held(staged.digest) is None:
            with contextlib.suppress(StorageError):
                await self._in_storage(staged.discard)
        await self._say(entry, "canceled", reason="no longer assigned")

    async def _pause(self, key: tuple[str, str], seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake[key].wait()

    async def _once(self, entry: Entry) -> None:
        target = self._metadata.trusted.bundle(entry.kind, entry.name, entry.version)
        if target is None:
            raise _WaitError(
                f"waiting: the metadata here does not list {entry.name}@{entry.version} yet"
            )
        if (target.digest, target.length) != (entry.target_hash, entry.target_length):
            raise VerificationError("the assignment names other bytes than the signed metadata")
        self._check_allowed(target)
        early = 0.0 if entry.not_before is None else entry.not_before - self._trust_store.now()
        if entry.not_before is not None and early > 0:
            moment = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(entry.not_before))
            raise _WaitError(f"waiting: not before {moment}", seconds=min(early, 3600.0))
        await self._bring(
            target, install=entry.action == "install", assignment_id=entry.assignment_id
        )

    def _check_allowed(self, target: BundleTarget) -> None:
        """Raises VerificationError: this device must not have this bundle."""
        if target.hardware and self._hardware not in target.hardware:
            raise VerificationError(
                f"the bundle is for hardware {', '.join(target.hardware)}, this device is {self._hardware or 'unnamed'}"
            )
        floor = self._trust_store.counter(target.kind, target.name)
        if target.release_counter < floor:
            raise VerificationError(
                f"release counter {target.release_counter} is below {floor}, which this device has committed"
            )
        for info in self._store.bundles():
            if info.name == target.name and info.kind != target.kind and info.state != "staged":
                raise VerificationError(f"{target.name} is a {info.kind} bundle on this device")

    async def _bring(self, target: BundleTarget, *, install: bool, assignment_id: str) -> None:
        row = Execution(
            digest=target.digest,
            name=BundleName(target.name),
            version=Version(target.version),
            kind=target.kind,
            assignment_id=assignment_id,
            status="in_progress",
            step="downloading",
            started=time.time(),
        )
        known = self.rows.get(target.digest)
        if known is not None:
            row.started = known.started
        held = self._store.held(target.digest)
        # A changed one is staged anew, from its own good files and whoever holds the rest.
        if held is not None and held.complete and not held.damaged:
            if install and self._store.active(row.name) is not held:
                await self._in_storage(self._store.activate, target.digest)
            elif known is not None and (known.status, known.assignment_id) == (
                "succeeded",
                assignment_id,
            ):
                return  # told before: a renewed set is no news
            await self._succeed(row, held, target, install=install)
            return
        staged = await self._download(row, target)
        row.pieces_have = staged.have.count
        if not install:
            row.status, row.step, row.reason = "succeeded", "", ""
            if assignment_id or not self.is_assigned(row.name, row.version):
                await self._put(row)
            return
        row.step, row.reason = "downloaded", ""
        await self._put(row)
        await self._activate(row, staged, target)

    async def _download(self, row: Execution, target: BundleTarget) -> StagedBundle:
        """Hold every piece; whoever wants the same bundle shares one download, which ends with the last who waits."""
        digest = target.digest
        while (shared := self._downloads.get(digest)) is not None and shared.abandoned:
            await asyncio.wait({shared.task})
        if shared is None:
            shared = _Shared(asyncio.ensure_future(self._fetch_all(row, target)))
            self._downloads[digest] = shared
            shared.task.add_done_callback(lambda _done: self._downloads.pop(digest, None))
        shared.waiting += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiting -= 1
            if shared.waiting == 0 and not shared.task.done():
                shared.abandoned = True
                shared.task.cancel()
                await asyncio.wait({shared.task})

    async def _fetch_all(self, row: Execution, target: BundleTarget) -> StagedBundle:
        async with self._slots:
            data = await self._manifest_bytes(target)
            parsed = await self._in_storage(_parse, data, target)
            if parsed.access == "assigned" and not self.is_assigned(target.name, target.version):
                raise NotAuthorizedError(
                    f"{target.name}@{target.version} may be read by devices it is assigned to, not by this one: "
                    "assign it first"
                )
            row.payload_bytes, row.pieces_total = parsed.payload_bytes, parsed.piece_count
            await self._put(row)
            staged = await self._in_storage(self._store.begin, data, parsed)
            row.pieces_have = staged.have.count
            del data, parsed  # megabytes that nobody needs while pieces come
            await self._in_storage(give_back)
            await self._put(row)
            if not staged.complete:
                await self._in_storage(staged.import_local)
            await self._swarm.fetch_bundle(staged)
            await self._in_storage(give_back)
            return staged

    async def _activate(self, row: Execution, staged: StagedBundle, target: BundleTarget) -> None:
        # The world may have changed while pieces came: what must not be installed any more is not.
        current = self._metadata.trusted.bundle(target.kind, target.name, target.version)
        if current is None or current.digest != target.digest:
            raise VerificationError("the signed metadata no longer lists this bundle")
        self._check_allowed(target)
        row.step = "installing"
        await self._put(row)
        await self._in_storage(staged.activate)
        row.step = "verifying"
        await self._put(row)
        held = self._store.held(target.digest)
        assert held is not None
        await self._succeed(row, held, target, install=True)
        await self._remove_older(row.name, keep=target.digest)

    async def _succeed(
        self, row: Execution, held: HeldBundle, target: BundleTarget, *, install: bool
    ) -> None:
        if install:
            await self._in_storage(
                self._trust_store.commit_counter, target.kind, target.name, target.release_counter
            )
        row.status, row.step, row.reason = "succeeded", "", ""
        row.payload_bytes, row.pieces_total = held.row.payload_bytes, held.row.piece_count
        row.pieces_have = held.have.count
        await self._put(row)

    async def _remove_older(self, name: BundleName, *, keep: Digest) -> None:
        """Keep the active version and the one before it; the way back must not cost the disk for ever."""
        others = [
            info for info in self._store.bundles() if info.name == name and info.state == "held"
        ]
        others.sort(
            key=lambda info: self.rows[info.digest].updated if info.digest in self.rows else 0.0
        )
        for info in others[:-1]:
            if info.digest != keep and not self.is_assigned(info.name, info.version):
                with contextlib.suppress(EdgeSyncError):
                    await self._in_storage(self._store.remove, info.digest)
                    await self._in_storage(self._executions.forget, info.digest)
                    self.removed(info.digest)

    async def _manifest_bytes(self, target: BundleTarget) -> bytes:
        with contextlib.suppress(NotFoundError):
            return await self._in_storage(self._store.manifest_bytes, target.digest)
        return await self._metadata.blob(target.digest, target.length)

    # --- saying -----------------------------------------------------------------------------------------------------
    async def _say(self, entry: Entry, status: str, *, step: str = "", reason: str = "") -> None:
        digest = Digest(entry.target_hash)
        row = self.rows.get(digest) or Execution(
            digest=digest,
            name=BundleName(entry.name),
            version=Version(entry.version),
            kind=entry.kind,
            assignment_id=entry.assignment_id,
            status=status,
            started=time.time(),
        )
        if (row.status, row.step, row.reason) == (status, step, reason) and digest in self.rows:
            return
        row.status, row.step, row.reason = status, step, reason
        row.assignment_id = entry.assignment_id
        await self._put(row)

    async def _put(self, row: Execution) -> None:
        self.rows[row.digest] = row
        now = state_of(row.status, row.step)
        before = self._told.get(row.digest)
        if (
            before is not None
            and before is not now
            and not before.ended
            and not may_follow(before, now)
        ):
            logger.error("%s@%s went from %s to %s", row.name, row.version, before, now)
        self._told[row.digest] = now
        # First what the gateway is to hear: after a power cut in between it is said twice, which the gateway sees
        # through, and never not at all.
        await self._on_change(row, self._is_news(row))
        try:
            await self._in_storage(self._executions.put, row)
        except StorageError:
            logger.exception("the state of %s@%s could not be stored", row.name, row.version)

    def _is_news(self, row: Execution) -> bool:
        """Whether an assignment got to a step it was not at before."""
        now = (row.assignment_id, row.status, row.step, row.reason)
        if self._settled.get(row.digest) == row.assignment_id:
            if not row.ended or row.status == "succeeded":
                return False
            del self._settled[row.digest]
        elif row.status == "succeeded":
            self._settled[row.digest] = row.assignment_id
        if self._reported.get(row.digest) == now:
            return False
        self._reported[row.digest] = now
        return True

    async def _in_storage(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._store.executor, function, *arguments
        )


def _parse(data: bytes, target: BundleTarget) -> Manifest:
    """Raises VerificationError: not a manifest, or not the one its target describes."""
    parsed = manifests.parse(data)
    check_manifest(target, parsed)
    return parsed


class _Shared:
    """A download and how many wait for it."""

    def __init__(self, task: "asyncio.Task[StagedBundle]") -> None:
        self.task = task
        self.waiting = 0
        self.abandoned = False


class _WaitError(Exception):
    """Not now, and why; ``seconds`` None waits until something changes."""

    def __init__(self, reason: str, *, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds
