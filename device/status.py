"""`edgesync agent status`: one object, from the running agent or, without one, from what lies on disk.

``build`` is used by both, so that a stopped agent's status has the same fields as a running one's.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from device.executions import Execution
from device.executions import read as read_executions
from device.state import Counters, StateDatabase
from edgesync.cli.output import size
from edgesync.errors import EdgeSyncError
from edgesync.ids import Digest
from edgesync.io import control
from edgesync.storage.datadir import DataDir

SCHEMA = "edgesync.agent-status/1"


def read(data: DataDir) -> dict[str, Any]:
    """The status, whoever can tell it. Raises ConfigError, StorageError: nobody can."""
    try:
        return control.ask(data.path, {"op": "status"})
    except control.AgentNotRunningError:
        return _from_disk(data)


def build(
    *,
    device_id: str,
    gateway: Mapping[str, object],
    peers: Iterable[Mapping[str, object]],
    executions: Iterable[Execution],
    counters: Mapping[Digest, Counters],
    metadata: Mapping[str, object],
    problems: Iterable[str],
    running: bool,
    caps: Iterable[Mapping[str, object]] = (),
    background: bool = False,
    budget: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "id": device_id,
        "running": running,
        "gateway": dict(gateway),
        "peers": [dict(peer) for peer in peers],
        "bundles": [_bundle(row, counters.get(row.digest, Counters())) for row in executions],
        "metadata": dict(metadata),
        "caps": [dict(cap) for cap in caps],
        "background": background,
        "budget": None if budget is None else dict(budget),
        "problems": list(problems),
    }


def _bundle(row: Execution, counters: Counters) -> dict[str, Any]:
    return {
        "name": row.name,
        "version": row.version,
        "kind": row.kind,
        "id": row.digest,
        "state": row.status,
        "step": row.step,
        "reason": row.reason,
        "payload_bytes": row.payload_bytes,
        "pieces_total": row.pieces_total,
        "pieces_have": row.pieces_have,
        "bytes_from_gateway": counters.bytes_from_gateway,
        "bytes_from_peers": counters.bytes_from_peers,
        "bytes_local": counters.bytes_local,
        "bytes_import": counters.bytes_import,
        "bytes_sent": counters.bytes_sent,
        "pieces_rejected": counters.pieces_rejected,
        "resumes": counters.resumes,
    }


def metadata_facts(view: Any) -> dict[str, object]:
    """Versions believed, and when the first of the files that gate new assignments expires (Unix seconds)."""
    return {
        "root": view.root_version,
        "timestamp": view.timestamp_version,
        "expires": view.expires,
    }


def _from_disk(data: DataDir) -> dict[str, Any]:
    from device.joining import Membership
    from device.trust_store import TrustStore

    joined = Membership.load(data)
    problems = ["the agent is not running: start it with `edgesync agent run`"]
    executions: list[Execution] = []
    counters: dict[Digest, Counters] = {}
    if data.state_database.exists():
        state = StateDatabase.read(data.state_database)
        try:
            executions = read_executions(state)
            counters = {row.digest: state.counters(row.digest) for row in executions}
        finally:
            state.close()
    metadata: dict[str, object] = {"root": 0, "timestamp": 0, "expires": None}
    try:
        store = TrustStore.open(data.path, read_only=True)
        try:
            metadata = metadata_facts(store.state.view)
        finally:
            store.close()
    except EdgeSyncError as exc:
        problems.append(str(exc))
    return build(
        device_id=joined.id,
        gateway={"connected": False, "last_seen": None, "id": joined.gateway},
        peers=[],
        executions=executions,
        counters=counters,
        metadata=metadata,
        problems=problems,
        running=False,
    )


def lines(shown: Mapping[str, Any]) -> Iterable[str]:
    """The status for a person; what waits says why."""
    gateway = shown["gateway"]
    yield f"device    {shown['id']}"
    word = "connected" if gateway["connected"] else "not connected"
    detail = gateway.get("detail") or ""
    carrier = f", data by {gateway['carrier']}" if gateway.get("carrier") else ""
    if carrier and gateway.get("proxy"):
        carrier += f" by the proxy {gateway['proxy']}"
    yield f"gateway   {gateway.get('id', '')} {word}{carrier}{': ' + detail if detail else ''}"
    if gateway.get("waiting"):
        yield f"waiting   {gateway['waiting']}"
    metadata = shown["metadata"]
    yield f"metadata  root {metadata['root']}, timestamp {metadata['timestamp']}"
    if shown.get("background"):
        yield "yields    to other traffic of the site's line (background)"
    if shown.get("budget"):
        yield f"budget    {shown['budget']['text']}"
    for cap in shown.get("caps", ()):
        where = "" if cap["where"] == "all" else f" ({cap['where']})"
        yield f"cap       {cap['what']}{where} {cap['text']}"
    for peer in shown["peers"]:
        how = f", sent to by {peer['controller']}" if peer.get("controller") else ""
        asks = ", asks for background" if peer.get("background") else ""
        where = f"by the proxy {peer['proxy']}" if peer.get("proxy") else f"at {peer['address']}"
        yield f"peer      {peer['id']} {where}{how}{asks}"
    for bundle in shown["bundles"]:
        share = bundle["pieces_have"] / max(1, bundle["pieces_total"])
        step = f" ({bundle['step']})" if bundle["step"] else ""
        yield f"bundle    {bundle['name']}@{bundle['version']} {bundle['state']}{step} {share:.0%}"
        yield (
            f"          {size(bundle['bytes_from_gateway'])} from gateway, "
            f"{size(bundle['bytes_from_peers'])} from peers, {size(bundle['bytes_local'])} local"
        )
        if bundle["reason"]:
            yield f"          {bundle['reason']}"
    for problem in shown["problems"]:
        yield f"problem   {problem}"
