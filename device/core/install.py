"""What may happen next to one bundle on one device, from the order to have it to its end.

It decides; the installer acts: it fetches, activates, commits, reports. The words are AWS IoT Jobs' and Mender's, as in
the reports a gateway stores. Rules:

* a bundle is installed only after every piece is held and durable; what was `files` is committed right after its
  activation, since nothing is left to check;
* a cancel before the activation leaves the version before as it was; from the activation on it is too late;
* a tree found damaged while it is activated is fetched again, not failed;
* every step that is not the network's has a timeout;
* an end is an end: only a new order starts again.

``TRANSITIONS`` is the whole machine; ``docs/state-machines.md`` is made from it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, assert_never

INSTALL_TIMEOUT_S: Final = 1800.0
"""Activation hashes and syncs every byte once: slow cards take minutes a gigabyte."""


class State(Enum):
    """``status`` or ``status.step`` of an execution."""

    QUEUED = "queued"
    DOWNLOADING = "in_progress.downloading"
    DOWNLOADED = "in_progress.downloaded"
    INSTALLING = "in_progress.installing"
    VERIFYING = "in_progress.verifying"
    ROLLING_BACK = "in_progress.rolling_back"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    REJECTED = "rejected"
    CANCELED = "canceled"
    REMOVED = "removed"

    @property
    def status(self) -> str:
        return self.value.partition(".")[0]

    @property
    def step(self) -> str:
        return self.value.partition(".")[2]

    @property
    def ended(self) -> bool:
        return not (self is State.QUEUED or self.step)


# --- events


@dataclass(frozen=True, slots=True)
class Ordered:
    """An assignment, or somebody at this machine, wants the bundle (again)."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """Signed metadata allows it here and there is a free slot."""


@dataclass(frozen=True, slots=True)
class Refused:
    """It may not be here: not listed, other hardware, a release counter below the floor, features unknown."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """Every piece is held and durable."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """Looked at again right before the activation: still wanted, listed and allowed."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """The activation found bytes that are not what was written."""


@dataclass(frozen=True, slots=True)
class Activated:
    """The tree is in its place and ``current`` points at it."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The new version is the one that counts; the release counter's floor was raised."""


@dataclass(frozen=True, slots=True)
class StepFailed:
    reason: str


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The version before is in use again."""


@dataclass(frozen=True, slots=True)
class Canceled:
    """The assignment set names it no longer."""


@dataclass(frozen=True, slots=True)
class Removed:
    """Its tree was deleted."""


@dataclass(frozen=True, slots=True)
class Tick:
    """``next_deadline`` has come."""


InstallEvent = (
    Ordered
    | Admitted
    | Refused
    | Fetched
    | Cleared
    | Damaged
    | Activated
    | Committed
    | StepFailed
    | RolledBack
    | Canceled
    | Removed
    | Tick
)

S = State
TRANSITIONS: Final[dict[tuple[State, type[InstallEvent]], State]] = {
    (S.QUEUED, Admitted): S.DOWNLOADING,
    (S.QUEUED, Refused): S.REJECTED,
    (S.QUEUED, StepFailed): S.FAILED,
    (S.QUEUED, Canceled): S.CANCELED,
    (S.DOWNLOADING, Fetched): S.DOWNLOADED,
    (S.DOWNLOADING, Refused): S.REJECTED,
    (S.DOWNLOADING, StepFailed): S.FAILED,
    (S.DOWNLOADING, Canceled): S.CANCELED,
    (S.DOWNLOADED, Cleared): S.INSTALLING,
    (S.DOWNLOADED, Refused): S.REJECTED,
    (S.DOWNLOADED, StepFailed): S.FAILED,
    (S.DOWNLOADED, Canceled): S.CANCELED,
    # An order to download only ends here.
    (S.DOWNLOADED, Committed): S.SUCCEEDED,
    (S.INSTALLING, Activated): S.VERIFYING,
    (S.INSTALLING, Damaged): S.DOWNLOADING,
    (S.INSTALLING, StepFailed): S.FAILED,
    (S.INSTALLING, Tick): S.TIMED_OUT,
    (S.VERIFYING, Committed): S.SUCCEEDED,
    (S.VERIFYING, StepFailed): S.ROLLING_BACK,
    (S.VERIFYING, Tick): S.ROLLING_BACK,
    (S.ROLLING_BACK, RolledBack): S.FAILED,
    (S.ROLLING_BACK, StepFailed): S.FAILED,
    (S.ROLLING_BACK, Tick): S.TIMED_OUT,
    (S.SUCCEEDED, Removed): S.REMOVED,
    (S.FAILED, Removed): S.REMOVED,
    (S.TIMED_OUT, Removed): S.REMOVED,
    (S.CANCELED, Removed): S.REMOVED,
    **{(end, Ordered): S.QUEUED for end in State if end.ended},
}

_EVENTS: Final[tuple[type[InstallEvent], ...]] = (
    Ordered,
    Admitted,
    Refused,
    Fetched,
    Cleared,
    Damaged,
    Activated,
    Committed,
    StepFailed,
    RolledBack,
    Canceled,
    Removed,
    Tick,
)
IGNORED: Final[frozenset[tuple[State, type[InstallEvent]]]] = frozenset(
    (state, event)
    for state in State
    for event in _EVENTS
    if (state, event) not in TRANSITIONS
    and (
        state.ended
        # Said again, late, or before its time is due.
        or event in {Ordered, Tick}
        # Too late: the activation is settled first.
        or (event is Canceled and state in {S.INSTALLING, S.VERIFYING, S.ROLLING_BACK})
    )
)
"""What may come and changes nothing. Any other pair is a mistake of the caller."""


# --- effects


@dataclass(frozen=True, slots=True)
class Report:
    """Store and tell the new state; ``reason`` is one sentence or empty."""

    state: State
    reason: str


@dataclass(frozen=True, slots=True)
class Fetch:
    pass


@dataclass(frozen=True, slots=True)
class StopFetching:
    """And keep what was fetched: the next order finds it."""


@dataclass(frozen=True, slots=True)
class Check:
    """Look again whether it may be installed."""


@dataclass(frozen=True, slots=True)
class Activate:
    pass


@dataclass(frozen=True, slots=True)
class Commit:
    pass


@dataclass(frozen=True, slots=True)
class Rollback:
    pass


InstallEffect = Report | Fetch | StopFetching | Check | Activate | Commit | Rollback


class Install:
    """One execution. ``state`` may be restored from a row: a restart goes on with what ``resume`` says."""

    def __init__(
        self,
        *,
        action: Literal["install", "download"] = "install",
        state: State = State.QUEUED,
        now: float = 0.0,
    ) -> None:
        self.action = action
        self.state = state
        self.reason = ""
        self._since = now

    def next_deadline(self) -> float | None:
        if self.state in {S.INSTALLING, S.VERIFYING, S.ROLLING_BACK}:
            return self._since + INSTALL_TIMEOUT_S
        return None

    def resume(self, *, now: float) -> list[InstallEffect]:
        """What to do after a restart; the store has settled a half-done activation already."""
        self._since = now
        return self._entered()

    def handle(self, event: InstallEvent, *, now: float) -> list[InstallEffect]:
        """Raises ValueError: the event cannot come in this state (a mistake of the caller)."""
        before = self.state
        deadline = self.next_deadline()
        if isinstance(event, Tick) and (deadline is None or now < deadline):
            return []
        after = TRANSITIONS.get((before, type(event)))
        if after is None:
            if (before, type(event)) in IGNORED:
                return []
            raise ValueError(f"{type(event).__name__} while {before.value}")
        self.state = after
        self._since = now
        match event:
            case Refused(reason) | StepFailed(reason):
                self.reason = reason
            case Tick():
                self.reason = f"{before.step} took longer than {INSTALL_TIMEOUT_S:.0f} s"
            case Damaged():
                self.reason = "pieces on disk are not what was written: fetching them again"
            case RolledBack():
                pass
            case _:
                self.reason = ""
        effects: list[InstallEffect] = [Report(after, self.reason)]
        if before is S.DOWNLOADING and after is not S.DOWNLOADED:
            effects.append(StopFetching())
        return effects + self._entered()

    def _entered(self) -> list[InstallEffect]:
        match self.state:
            case S.DOWNLOADING:
                return [Fetch()]
            case S.DOWNLOADED:
                return [Check()] if self.action == "install" else [Commit()]
            case S.INSTALLING:
                return [Activate()]
            case S.VERIFYING:
                return [Commit()]
            case S.ROLLING_BACK:
                return [Rollback()]
            case (
                S.QUEUED
                | S.SUCCEEDED
                | S.FAILED
                | S.TIMED_OUT
                | S.REJECTED
                | S.CANCELED
                | S.REMOVED
            ):
                return []
            case _:
                assert_never(self.state)


def state_of(status: str, step: str) -> State:
    """The state a stored row is in. Raises ValueError: no such state."""
    return State(f"{status}.{step}" if step else status)


def may_follow(before: State, after: State) -> bool:
    """Whether some event leads from one state straight to the other."""
    return any(
        source is before and target is after for (source, _event), target in TRANSITIONS.items()
    )
