import json

import pytest

from device.joining import Membership, load_or_make_identity
from edgesync.errors import ConfigError, ExitCode
from edgesync.storage.datadir import DataDir

GOOD = {
    "id": "cam-1",
    "gateway": "gw",
    "gateway_key": "a" * 64,
    "region": "eu",
    "state": "accepted",
}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        *(json.dumps({**GOOD, key: 3}) for key in ("id", "region", "labels", "brokers")),
    ],
)
def test_a_damaged_membership_is_one_sentence(tmp_path, text):
    data = DataDir.create(tmp_path / "agent", "agent")
    data.join_file.write_text(json.dumps(GOOD))
    assert Membership.load(data).id == "cam-1"
    data.join_file.write_text(text)
    with pytest.raises(ConfigError, match="is damaged: join again"):
        Membership.load(data)


def test_a_damaged_key_names_its_file(tmp_path):
    data = DataDir.create(tmp_path / "agent", "agent")
    load_or_make_identity(data)
    data.identity_key.write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"identity\.key.*new data directory") as caught:
        load_or_make_identity(data)
    assert caught.value.exit_code == ExitCode.CONFIG
