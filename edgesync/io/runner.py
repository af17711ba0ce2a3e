"""The one loop around a decision core: event in, effects run in order, the core's deadline armed.

It knows nothing of what events and effects mean. Invariants: events are handled one at a time, in the order fed, also
when running an effect feeds another; every effect of an event runs before the next event is handled; effects are
numbered, so that a test can stop a program at the N-th. Event loop only.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)

EventT = TypeVar("EventT")
EffectT = TypeVar("EffectT")
EventIn_contra = TypeVar("EventIn_contra", contravariant=True)
MIN_TICK_S = 0.01


class Core(Protocol[EventIn_contra, EffectT]):
    def handle(self, event: EventIn_contra, *, now: float) -> "list[EffectT]": ...

    def next_deadline(self) -> float | None: ...


class Runner(Generic[EventT, EffectT]):
    """``perform`` runs one effect and returns at once; it may feed."""

    def __init__(
        self,
        core: Core[EventT, EffectT],
        perform: Callable[[EffectT], None],
        *,
        tick: EventT,
        before_effect: Callable[[int, EffectT], None] | None = None,
    ) -> None:
        self._core = core
        self._perform = perform
        self._tick = tick
        self._before_effect = before_effect
        self._loop = asyncio.get_running_loop()
        self._events: deque[EventT] = deque()
        self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.effects = 0
        """Effects run so far."""

    def feed(self, event: EventT) -> None:
        if self._closed:
            return
        self._events.append(event)
        if self._running:
            return
        self._running = True
        try:
            while self._events and not self._closed:
                for effect in self._core.handle(self._events.popleft(), now=self._loop.time()):
                    self.effects += 1
                    if self._before_effect is not None:
                        self._before_effect(self.effects, effect)
                    self._perform(effect)
        finally:
            self._running = False
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = None if self._closed else self._core.next_deadline()
        if deadline is not None:
            # A deadline that has passed is no reason to spin.
            at = max(deadline, self._loop.time() + MIN_TICK_S)
            self._timer = self._loop.call_at(at, self.feed, self._tick)

    def close(self) -> None:
        self._closed = True
        self._events.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
