"""Links with a rate, a delay and loss, between machines that send whole messages.

Every machine has one uplink and one downlink. What is sent waits its turn at the uplink (turns go round the
receivers, as fair queueing and many streams on one socket do), travels, and takes its time at the downlink. Loss makes
a message larger and later, as a reliable transport over a lossy link does; it is never seen as a missing message.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from simulations.kernel import Kernel


@dataclass(frozen=True, slots=True)
class Link:
    """Bytes per second, seconds one way, share of packets lost."""

    up_bytes_s: float
    down_bytes_s: float
    delay_s: float = 0.001
    loss: float = 0.0


@dataclass(slots=True)
class _Port:
    link: Link
    queues: dict[str, deque[tuple[int, Callable[[], None]]]]
    turn: deque[str]
    sending: bool = False
    down_free_at: float = 0.0
    up: bool = True
    bytes_sent: int = 0


class Network:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._rng = kernel.rng("network")
        self._ports: dict[str, _Port] = {}

    def attach(self, name: str, link: Link) -> None:
        self._ports[name] = _Port(link, {}, deque())

    def cut(self, name: str) -> None:
        """The machine is gone: what it sends or should receive is lost."""
        port = self._ports[name]
        port.up = False
        port.queues.clear()
        port.turn.clear()

    def restore(self, name: str) -> None:
        self._ports[name].up = True

    def is_up(self, name: str) -> bool:
        return self._ports[name].up

    def bytes_sent(self, name: str) -> int:
        return self._ports[name].bytes_sent

    def rtt_s(self, one: str, other: str) -> float:
        """Without queues and loss."""
        return 2 * (self._ports[one].link.delay_s + self._ports[other].link.delay_s)

    def waiting(self, sender: str, receiver: str) -> int:
        """Messages queued at the sender's uplink for this receiver."""
        return len(self._ports[sender].queues.get(receiver, ()))

    def send(
        self, sender: str, receiver: str, size_bytes: int, arrived: Callable[[], None]
    ) -> None:
        port = self._ports[sender]
        if not port.up:
            return
        queue = port.queues.get(receiver)
        if queue is None:
            queue = port.queues[receiver] = deque()
        if not queue:
            port.turn.append(receiver)
        queue.append((size_bytes, arrived))
        if not port.sending:
            self._next(sender)

    def drop(self, sender: str, receiver: str) -> None:
        """Forget what waits at the uplink for a receiver that gave up."""
        port = self._ports[sender]
        if port.queues.pop(receiver, None) is not None and receiver in port.turn:
            port.turn.remove(receiver)

    def _next(self, sender: str) -> None:
        port = self._ports[sender]
        if not port.turn:
            port.sending = False
            return
        port.sending = True
        receiver = port.turn.popleft()
        queue = port.queues[receiver]
        size, arrived = queue.popleft()
        if queue:
            port.turn.append(receiver)
        other = self._ports[receiver]
        loss = max(port.link.loss, other.link.loss)
        carried = size / (1.0 - loss)
        out = self._kernel.now + carried / port.link.up_bytes_s
        self._kernel.at(out, lambda: self._next(sender))
        port.bytes_sent += size
        delay = port.link.delay_s + other.link.delay_s
        if loss and self._rng.random() < min(0.9, loss * carried / 1200):
            delay += 2 * delay * self._rng.random()
        time_in = carried / other.link.down_bytes_s
        ready = max(out + delay, other.down_free_at + time_in, self._kernel.now + delay + time_in)
        other.down_free_at = ready
        self._kernel.at(ready, lambda: self._arrive(sender, receiver, arrived))

    def _arrive(self, sender: str, receiver: str, arrived: Callable[[], None]) -> None:
        if self._ports[receiver].up and self._ports[sender].up:
            arrived()
