"""What the role-neutral commands (`bundle …`, `config show`) do on a device.

A running agent answers over its socket, since one process at a time has the store open; without one the store is opened
here, under the directory's lock.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from device.bundle_store import BundleInfo, BundleStore
from device.config import AgentSettings
from device.executions import Executions
from device.getting import parse
from device.state import StateDatabase
from edgesync import config
from edgesync.errors import ConflictError, NotFoundError, UsageError
from edgesync.ids import Digest
from edgesync.io import control
from edgesync.storage.datadir import DataDir


def bundle_list(data: Path) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", _ask_or_do(data, {"op": "bundle_list"})["bundles"])


def bundle_show(data: Path, bundle: str) -> dict[str, Any]:
    return _ask_or_do(data, {"op": "bundle_show", "bundle": bundle})


def bundle_verify(data: Path, bundle: str) -> dict[str, Any]:
    return _ask_or_do(data, {"op": "bundle_verify", "bundle": bundle}, timeout_s=3600.0)


def bundle_remove(data: Path, bundle: str) -> dict[str, Any]:
    return _ask_or_do(data, {"op": "bundle_remove", "bundle": bundle}, timeout_s=600.0)


def config_show(data: Path) -> list[dict[str, Any]]:
    return config.show(config.load(AgentSettings, DataDir.open(data, "agent").config))


def _ask_or_do(
    data: Path, request: dict[str, object], *, timeout_s: float = 30.0
) -> dict[str, Any]:
    directory = DataDir.open(data, "agent")
    try:
        return control.ask(directory.path, request, timeout_s=timeout_s)
    except control.AgentNotRunningError:
        with _store(directory) as store:
            return perform(store, request, assigned=lambda _name, _version: False)


@contextmanager
def _store(directory: DataDir) -> Iterator[BundleStore]:
    with directory.lock():
        state = StateDatabase.open(directory.state_database)
        try:
            store = BundleStore.open(directory.path, state)
            try:
                yield store
            finally:
                store.close()
        finally:
            state.close()


def perform(
    store: BundleStore,
    request: dict[str, object],
    *,
    assigned: Any,
    fetching: Callable[[Digest], bool] = lambda _digest: False,
) -> dict[str, Any]:
    """One operation on an open store; blocking.

    ``assigned(name, version)`` and ``fetching(digest)`` say what must not be removed.
    """
    operation = request["op"]
    if operation == "bundle_list":
        return {"bundles": [facts(info) for info in store.bundles()]}
    info = find(store, str(request.get("bundle", "")))
    match operation:
        case "bundle_show":
            return facts(info)
        case "bundle_verify":
            paths = store.verify(info.digest)
            held = store.held(info.digest)
            bad = list(held.have.missing()) if held is not None else []
            return {
                "name": info.name,
                "version": info.version,
                "pieces": info.pieces_total,
                "bad": bad,
                "paths": paths,
            }
        case "bundle_remove":
            if assigned(info.name, info.version):
                raise ConflictError(
                    f"{info.name}@{info.version} is assigned to this device: unassign it on the gateway first"
                )
            if fetching(info.digest):
                raise ConflictError(f"{info.name}@{info.version} is being fetched")
            store.remove(info.digest)
            # What became of it is not to be told of a bundle that is not here.
            Executions(store.state).forget(info.digest)
            return {"id": info.digest, "name": info.name, "version": info.version}
        case _:
            raise UsageError(f"no operation {operation!a}")


def find(store: BundleStore, bundle: str) -> BundleInfo:
    """The bundle called ``NAME@VERSION``. Raises UsageError, NotFoundError."""
    name, version = parse(bundle)
    if version is None:
        raise UsageError(f"name a version: {name}@VERSION")
    for info in store.bundles():
        if (info.name, info.version) == (name, version):
            return info
    raise NotFoundError(f"{bundle} is not on this device")


def facts(info: BundleInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "version": info.version,
        "kind": info.kind,
        "id": info.digest,
        "state": info.state,
        "access": info.access,
        "release_counter": info.release_counter,
        "payload_bytes": info.payload_bytes,
        "unique_bytes": info.unique_bytes,
        "pieces_total": info.pieces_total,
        "pieces_have": info.pieces_have,
    }
