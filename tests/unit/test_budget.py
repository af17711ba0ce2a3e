"""The one budget of received bytes: never passed, handed on in turn."""

import asyncio

import pytest

from edgesync.transport.flow import Budget


async def test_what_is_not_there_is_waited_for_in_turn() -> None:
    budget = Budget(100)
    assert budget.reserve(80)
    assert not budget.reserve(30)
    first = asyncio.create_task(budget.reserve_soon(50))
    second = asyncio.create_task(budget.reserve_soon(10))
    await asyncio.sleep(0)
    assert not budget.reserve(5), "nobody jumps the line"
    budget.release(80)
    await asyncio.gather(first, second)
    assert budget.used == 60


async def test_a_cancelled_wait_takes_nothing() -> None:
    budget = Budget(100)
    budget.reserve(100)
    waiting = asyncio.create_task(budget.reserve_soon(50))
    behind = asyncio.create_task(budget.reserve_soon(10))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    budget.release(20)
    await behind
    assert budget.used == 90


async def test_a_grant_that_meets_a_cancellation_goes_back() -> None:
    budget = Budget(100)
    budget.reserve(100)
    waiting = asyncio.create_task(budget.reserve_soon(50))
    await asyncio.sleep(0)
    budget.release(100)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert budget.used == 0


async def test_more_than_everything_is_our_mistake() -> None:
    with pytest.raises(ValueError):
        await Budget(10).reserve_soon(11)
