"""Which failures, returns and detours of one connection are worth a line in the log.

Pure: it decides, its caller logs. A device whose gateway is away tries for days, and a connection that comes and goes
fails many times a minute: the first failure is told, then one in LOG_AGAIN_S at most, and the return once. A detour is
told when it begins, and once more, as a warning, when it lasts: after an outage the port beside may only answer first.

Called by ``edgesync.io.mqtt``.
"""

from typing import Final

LOG_AGAIN_S: Final = 300.0


class OutageLog:
    """Times are monotonic seconds."""

    def __init__(self) -> None:
        self._next_at = float("-inf")
        self._untold = 0
        self._down_told = True

    def up(self) -> bool:
        """It stands. True: that is news."""
        told, self._down_told = self._down_told, False
        return told

    def settled(self) -> None:
        """It stood for long: the next failure begins an outage of its own."""
        self._next_at = float("-inf")
        self._untold = 0

    def failed(self, *, now: float) -> int | None:
        """It does not stand. None: no news; else how many failures were not told before this one."""
        if now < self._next_at:
            self._untold += 1
            return None
        self._next_at = now + LOG_AGAIN_S
        self._down_told = True
        untold, self._untold = self._untold, 0
        return untold


class DetourLog:
    """Times are monotonic seconds."""

    def __init__(self, *, lasts_s: float) -> None:
        """A detour that old lasts."""
        self._lasts_s = lasts_s
        self._since: float | None = None
        self._told = ("", False)

    def serves(self, detour: str, *, now: float) -> bool | None:
        """By this detour the connection stands, or by none (""). None: no news; else whether the detour lasts."""
        if not detour:
            self._since = None
            self._told = ("", False)
            return None
        if self._since is None:
            self._since = now
        lasts = now - self._since >= self._lasts_s
        told, told_lasts = self._told
        if detour == told and lasts <= told_lasts:
            return None
        self._told = (detour, lasts)
        return lasts

    def nothing_serves(self) -> None:
        """The detour is no longer one: which way answers first after the outage says little again."""
        self._since = None
