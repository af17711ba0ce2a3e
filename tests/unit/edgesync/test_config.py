import tomllib
from dataclasses import dataclass

import pytest

from edgesync import config
from edgesync.config import HostPort, setting
from edgesync.errors import ConfigError, UsageError


@dataclass(frozen=True)
class Sample:
    listen: HostPort = setting(HostPort("", 7443), config.host_port(7443), "Where to listen.")
    upload_limit: int = setting(0, config.parse_rate, "Bytes per second.\n0 is unlimited.")
    mdns: bool = setting(True, config.boolean, "Find peers by mDNS.")
    gateways: tuple[HostPort, ...] = setting(
        (), config.list_of(config.host_port(7443)), "Gateways."
    )
    name: str = setting("", config.text, "A name.")


def test_file_environment_flag(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text('upload_limit = "4MB"\nmdns = false\nname = "file"\n')
    got = config.load(
        Sample,
        path,
        environ={"EDGESYNC_UPLOAD_LIMIT": "1kB", "EDGESYNC_MDNS": "yes", "EDGESYNC_OTHER": "x"},
        flags={"upload_limit": "7", "mdns": None},
    )
    assert (got.values.upload_limit, got.values.mdns, got.values.name) == (7, True, "file")
    assert got.origins == {
        "listen": "default",
        "upload_limit": "flag",
        "mdns": "environment EDGESYNC_MDNS",
        "gateways": "default",
        "name": str(path),
    }
    assert {row["key"]: row["value"] for row in config.show(got)}["listen"] == ":7443"


def test_errors_name_file_key_and_nearest(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("upload_limt = 5\n")
    with pytest.raises(
        ConfigError, match=r"x\.toml: unknown key 'upload_limt'; did you mean 'upload_limit'\?"
    ):
        config.load(Sample, path, environ={})
    path.write_text("upload_limit = 'fast'\n")
    with pytest.raises(ConfigError, match=r"x\.toml: upload_limit: 'fast' is not a rate"):
        config.load(Sample, path, environ={})
    path.write_text("= [\n")
    with pytest.raises(ConfigError, match="is not TOML"):
        config.load(Sample, path, environ={})
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        config.load(Sample, path, environ={})
    with pytest.raises(ConfigError, match="EDGESYNC_LISTEN"):
        config.load(Sample, None, environ={"EDGESYNC_LISTEN": "a:b"})
    with pytest.raises(UsageError, match="--upload-limit"):
        config.load(Sample, None, environ={}, flags={"upload_limit": "x"})


def test_rendered_file_is_read_back(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(
        config.render(
            Sample, "Sample", {"name": 'a"b\\c', "gateways": (HostPort("h", 1), HostPort("::1", 2))}
        )
    )
    got = config.load(Sample, path, environ={}).values
    assert got == Sample(name='a"b\\c', gateways=(HostPort("h", 1), HostPort("::1", 2)))
    uncommented = "\n".join(
        line[1:] if line.startswith("#") and not line.startswith("# ") else line
        for line in path.read_text().splitlines()
    )
    assert set(tomllib.loads(uncommented)) == {"listen", "upload_limit", "mdns", "gateways", "name"}


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("500kB", 500_000),
        ("4MB", 4_000_000),
        ("4MiB", 4 << 20),
        ("1.5 MB/s", 1_500_000),
        ("0", 0),
        (12, 12),
        ("900", 900),
        ("2KiB", 2048),
        ("5B", 5),
    ],
)
def test_rates(text, rate):
    assert config.parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["fast", "-1", "4Mb", "4MBps", "0.0001kB", "", True, -5, None, "1e9", "4 TB", 1.5]
)
def test_not_rates(text):
    with pytest.raises(ValueError):
        config.parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("15m", 900), ("1h", 3600), ("1.5h", 5400), ("7d", 604800), (30, 30)],
)
def test_durations(text, seconds):
    assert config.parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host:1", HostPort("host", 1)),
        (":8883", HostPort("", 8883)),
        ("host", HostPort("host", 7443)),
        ("10.0.0.1:99", HostPort("10.0.0.1", 99)),
        ("[::1]:5", HostPort("::1", 5)),
        ("[fe80::1]", HostPort("fe80::1", 7443)),
        ("2001:db8::1", HostPort("2001:db8::1", 7443)),
        ("gw.example.org:0", HostPort("gw.example.org", 0)),
    ],
)
def test_addresses(text, expected):
    assert config.parse_host_port(text, default_port=7443, any_host=True) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host:",
        "host:x",
        "host:99999",
        "[::1",
        "[zz]:1",
        "a b:1",
        "[::1]1",
        "::zz",
        "h:\u0663",
        "-x:1",
    ],
)
def test_not_addresses(text):
    with pytest.raises(ValueError):
        config.parse_host_port(text, default_port=7443, any_host=True)
    with pytest.raises(ValueError):
        config.parse_host_port(":80")


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31m", "\x7f", "\x9b31m", "\u202e", 3, "x" * 5000])
def test_text_is_one_line_that_can_be_printed(text):
    with pytest.raises(ValueError, match="not one line of printable text") as caught:
        config.text(text)
    assert str(caught.value).isprintable()
    assert config.text("ä b c") == "ä b c"


def test_one_of_its_names():
    parse = config.one_of("auto", "bbr")
    assert parse("bbr") == "bbr"
    with pytest.raises(ValueError, match="'vegas' is none of auto, bbr"):
        parse("vegas")
    with pytest.raises(ValueError, match="none of"):
        parse(["bbr"])
