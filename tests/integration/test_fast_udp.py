"""The UDP shell on loopback: joined and cut datagrams, kernels that refuse, the pause of a trickle, its end."""

import asyncio
import errno
import socket
from collections.abc import Sequence
from typing import Any

import pytest

from edgesync.transport import udp
from edgesync.transport.udp import UdpSocket, bind


class Inbox:
    def __init__(self) -> None:
        self.datagrams: list[bytes] = []
        self.batches = 0
        self.changed = asyncio.Event()

    def received(self, datagrams: Sequence[bytes], address: Any) -> None:
        del address
        self.datagrams += datagrams
        self.changed.set()

    def batch_done(self) -> None:
        self.batches += 1

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.datagrams) < count:
                self.changed.clear()
                await self.changed.wait()


def open_socket(inbox: Inbox, *, offload: bool = True) -> UdpSocket:
    return UdpSocket(
        bind("127.0.0.1", 0),
        received=inbox.received,
        batch_done=inbox.batch_done,
        refused=lambda _: None,
        offload=offload,
    )


@pytest.mark.parametrize("sends", [True, False])
@pytest.mark.parametrize("receives", [True, False])
async def test_every_datagram_arrives_whole(sends: bool, receives: bool) -> None:
    left, right = Inbox(), Inbox()
    sender, receiver = open_socket(left, offload=sends), open_socket(right, offload=receives)
    sizes = [1452] * 70 + [300] + [1200] * 3 + [1, 8900, 8900, 20, 1452]
    datagrams = [bytes([i % 256]) * size for i, size in enumerate(sizes)]
    assert sender.send([(data, receiver.address) for data in datagrams]) is None
    await right.wait_for(len(datagrams))
    assert right.datagrams == datagrams
    assert sender.bytes_out == receiver.bytes_in == sum(sizes)
    assert sender.datagrams_out == receiver.datagrams_in == len(sizes)
    sender.close()
    receiver.close()


class Refusing:
    """A socket on whose path the kernel cannot cut datagrams."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self._sock = sock
        self._number = number
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendmsg(self, *_: Any) -> int:
        self.refused += 1
        raise OSError(self._number, "refused")


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.ENOPROTOOPT])
async def test_a_path_that_refuses_is_served_without(number: int) -> None:
    left, right = Inbox(), Inbox()
    sender, receiver = open_socket(left), open_socket(right)
    if not sender.segments:
        pytest.skip("this kernel does not cut datagrams")
    refusing = Refusing(sender._sock, number)
    sender._sock = refusing  # type: ignore[assignment]
    for _ in range(12):
        sender.send([(bytes(1000), receiver.address)] * 5)
    await right.wait_for(60)
    assert not sender.segments
    assert refusing.refused <= 8 * 5
    sender._sock = refusing._sock
    sender.close()
    receiver.close()


async def test_a_trickle_is_left_to_gather_and_all_of_it_is_read() -> None:
    left, right = Inbox(), Inbox()
    sender, receiver = open_socket(left), open_socket(right)
    count = 0
    async with asyncio.timeout(20):
        while receiver._pause is None:
            sender.send([(bytes(100), receiver.address)])
            count += 1
            await asyncio.sleep(0)
    sender.send([(bytes(100), receiver.address)] * 20)
    await right.wait_for(count + 20)
    assert right.batches < count + 20
    sender.close()
    receiver.close()


async def test_closing_in_the_pause_reads_nothing_more() -> None:
    left, right = Inbox(), Inbox()
    sender, receiver = open_socket(left), open_socket(right)
    async with asyncio.timeout(20):
        while receiver._pause is None:
            sender.send([(bytes(100), receiver.address)])
            await asyncio.sleep(0)
    receiver.close()
    batches = right.batches
    await asyncio.sleep(3 * udp.COALESCE_S)
    assert right.batches == batches
    receiver.close()
    sender.close()


async def test_a_callback_may_close_the_socket_it_is_called_from() -> None:
    left, right = Inbox(), Inbox()
    sender, receiver = open_socket(left), open_socket(right)
    closed, to = asyncio.Event(), receiver.address

    def received(datagrams: Sequence[bytes], address: Any) -> None:
        right.received(datagrams, address)
        if receiver._busy >= 7:
            receiver.close()
            closed.set()

    receiver._received = received
    async with asyncio.timeout(20):
        while not closed.is_set():
            sender.send([(bytes(100), to)])
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert receiver._pause is None or not receiver._listening
    sender.close()
    receiver.close()


async def test_datagrams_lost_to_a_small_receive_buffer_are_said() -> None:
    left, right = Inbox(), Inbox()
    sender, receiver = open_socket(left), open_socket(right)
    receiver._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    receiver.receive_buffer = receiver._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert receiver.warnings() == []
    sender.send([(bytes(1000), receiver.address)] * 200)
    lost = receiver.lost_in_kernel()
    if not lost:
        pytest.skip("this kernel does not tell what it dropped")
    assert f"dropped {lost} datagrams" in receiver.warnings()[0]
    assert "net.core.rmem_max" in receiver.warnings()[0]
    sender.close()
    receiver.close()
    assert receiver.warnings() == []
