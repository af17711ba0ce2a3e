"""A set that cannot be taken is said, kept, and taken when it can be."""

from collections.abc import Iterable

import pytest

from device.orders import Orders
from edgesync.assignment import Entry
from edgesync.errors import DiskFullError, EdgeSyncError, MetadataExpiredError, RollbackRefusedError


class Agent:
    def __init__(self) -> None:
        self.error: EdgeSyncError | None = None
        self.tried: list[bytes] = []
        self.wanted = 0
        self.room = 0
        self.orders = Orders(accept=self.accept, want=self.want, make_room=self.make_room)

    async def accept(self, data: bytes) -> tuple[Entry, ...]:
        self.tried.append(data)
        if self.error is not None:
            raise self.error
        return ()

    def want(self, _entries: Iterable[Entry]) -> None:
        self.wanted += 1

    def make_room(self) -> None:
        self.room += 1

    async def offer(self, data: bytes) -> None:
        """As the link does."""
        try:
            await self.orders.offered(data)
        except EdgeSyncError as exc:
            self.orders.refused(data, exc)


@pytest.fixture
def agent() -> Agent:
    return Agent()


async def test_what_is_refused_is_tried_until_it_is_taken(agent: Agent) -> None:
    agent.error = MetadataExpiredError("the set has expired")
    await agent.offer(b"one")
    assert agent.orders.problem == "an assignment cannot be taken now: the set has expired"
    await agent.orders.try_again()
    assert (agent.tried, agent.wanted, agent.room) == ([b"one"] * 2, 0, 0)
    agent.error = None
    await agent.orders.try_again()
    await agent.orders.try_again()
    assert (agent.tried, agent.wanted, agent.orders.problem) == ([b"one"] * 3, 1, "")


async def test_a_full_disk_gets_room(agent: Agent) -> None:
    agent.error = DiskFullError("the disk is full")
    await agent.offer(b"one")
    await agent.orders.try_again()
    assert agent.room == 2


async def test_a_newer_one_ends_the_tries(agent: Agent) -> None:
    agent.error = MetadataExpiredError("the set has expired")
    await agent.offer(b"one")
    agent.error = None
    await agent.offer(b"two")
    await agent.orders.try_again()
    assert (agent.tried, agent.orders.problem) == ([b"one", b"two"], "")
    # And one that was found to be older than what is stored is let go.
    agent.error = MetadataExpiredError("the set has expired")
    await agent.offer(b"three")
    agent.error = RollbackRefusedError("older")
    await agent.orders.try_again()
    await agent.orders.try_again()
    assert (agent.tried[2:], agent.orders.problem) == ([b"three"] * 2, "")
