"""The virtual clock: an event heap and a seeded source of chance. Nothing else in a simulation knows time.

Ties in time are settled by the order of scheduling, so a run depends on its seed alone.
"""

import hashlib
import heapq
from collections.abc import Callable
from random import Random

Action = Callable[[], None]


class Timer:
    """A scheduled action; ``cancel`` makes it do nothing."""

    __slots__ = ("action", "cancelled")

    def __init__(self, action: Action) -> None:
        self.action = action
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Kernel:
    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.seed = seed
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._digest = hashlib.sha256()
        self.steps = 0

    def rng(self, name: str) -> Random:
        """An own stream of chance for each user of it: adding one changes no other."""
        return Random(f"{self.seed}/{name}")

    def at(self, time: float, action: Action) -> Timer:
        timer = Timer(action)
        self._count += 1
        heapq.heappush(self._heap, (max(time, self.now), self._count, timer))
        return timer

    def after(self, seconds: float, action: Action) -> Timer:
        return self.at(self.now + seconds, action)

    def trace(self, *facts: object) -> None:
        """Add one line to the run's fingerprint."""
        self._digest.update(f"{self.now:.9f} {' '.join(map(str, facts))}\n".encode())

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()

    def run(self, *, until: float, done: Callable[[], bool]) -> bool:
        """Run until ``done`` (True), or until the time or the events run out (False)."""
        while self._heap and not done():
            time, _order, timer = heapq.heappop(self._heap)
            if time > until:
                self.now = until
                return False
            self.now = time
            if not timer.cancelled:
                self.steps += 1
                timer.action()
        return done()
