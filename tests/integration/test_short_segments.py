"""TCP segments of links that carry little are short both ways, as the kernel sees them."""

import socket

import pytest

from edgesync.io.tcp import SEGMENT_BYTES, connect_in_short_segments


def test_both_directions_keep_to_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        with connect_in_short_segments(host, port, timeout_s=5.0) as near:
            far, _ = server.accept()
            with far:
                for sock in (near, far):
                    used = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
                    assert 1000 < used <= SEGMENT_BYTES
                near.sendall(b"x")
                assert far.recv(1) == b"x"


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        connect_in_short_segments("127.0.0.1", port, timeout_s=5.0)
