"""Where shells get the time that cores take as an argument."""

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def utc_now(self) -> float:
        """Seconds since 1970; the system's, which may be wrong."""
        ...


class SystemClock:
    def now(self) -> float:
        return time.monotonic()

    def utc_now(self) -> float:
        return time.time()
