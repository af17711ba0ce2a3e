"""Golden MQTT payloads: what this version writes, byte for byte, and what every later one must still read.

``mqtt.json`` is only added to. Keys come from the seeds beside them; signatures are made by Ed25519 as RFC 8032 has it,
so that another implementation gets the same bytes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edgesync.envelope import SigningKey
from edgesync.wire import mqtt
from edgesync.wire.topics import parse

VECTORS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("mqtt.json").read_text())
TYPES = {
    "presence": mqtt.Presence,
    "cmd": mqtt.Cmd,
    "state": mqtt.State,
    "report": mqtt.Report,
    "peers": mqtt.Peers,
    "rsp": mqtt.Rsp,
    "caps": mqtt.Caps,
}


@pytest.mark.parametrize("vector", VECTORS, ids=[one["name"] for one in VECTORS])
def test_golden(vector: dict[str, Any]) -> None:
    seed = bytes.fromhex(vector["seed"])
    signer = SigningKey.from_seed(seed)
    topic = parse(vector["topic"])
    data = vector["data"].encode()
    message = mqtt.unseal(topic, data, keys={signer.key})
    assert type(message) is TYPES[topic.kind.value]
    assert mqtt.encode(message).decode() == vector["payload"]
    assert mqtt.seal(message, signer) == data
    covered = b"edgesync/1/" + topic.kind.value.encode() + b"\0" + vector["payload"].encode()
    assert hashlib.sha256(covered).hexdigest() == vector["signed_sha256"]
    # An implementation that is not the one the project signs with agrees.
    assert Ed25519PrivateKey.from_private_bytes(seed).sign(covered).hex() == vector["signature"]
