import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from device.core import install as i
from device.core.install import Install, State


def _through(core: Install, *events: i.InstallEvent) -> list[i.InstallEffect]:
    effects: list[i.InstallEffect] = []
    for event in events:
        effects = core.handle(event, now=0.0)
    return effects


def test_files_are_committed_right_after_activation() -> None:
    core = Install()
    assert _through(core, i.Admitted()) == [i.Report(State.DOWNLOADING, ""), i.Fetch()]
    assert _through(core, i.Fetched()) == [i.Report(State.DOWNLOADED, ""), i.Check()]
    assert _through(core, i.Cleared()) == [i.Report(State.INSTALLING, ""), i.Activate()]
    assert _through(core, i.Activated()) == [i.Report(State.VERIFYING, ""), i.Commit()]
    assert _through(core, i.Committed()) == [i.Report(State.SUCCEEDED, "")]


def test_download_only_never_activates() -> None:
    core = Install(action="download")
    assert _through(core, i.Admitted(), i.Fetched()) == [
        i.Report(State.DOWNLOADED, ""),
        i.Commit(),
    ]


def test_cancel_stops_the_fetch_and_is_too_late_while_installing() -> None:
    core = Install()
    assert _through(core, i.Admitted(), i.Canceled()) == [
        i.Report(State.CANCELED, ""),
        i.StopFetching(),
    ]
    core = Install(state=State.INSTALLING)
    assert core.handle(i.Canceled(), now=0.0) == []
    assert core.state is State.INSTALLING


def test_damage_is_fetched_again() -> None:
    core = Install(state=State.INSTALLING)
    assert core.handle(i.Damaged(), now=0.0)[1:] == [i.Fetch()]


def test_steps_time_out_but_the_network_does_not() -> None:
    core = Install(state=State.DOWNLOADING)
    assert core.next_deadline() is None
    assert core.handle(i.Tick(), now=1e9) == []
    core = Install(state=State.INSTALLING, now=5.0)
    assert core.next_deadline() == 5.0 + i.INSTALL_TIMEOUT_S
    core.handle(i.Tick(), now=5.0 + i.INSTALL_TIMEOUT_S)
    assert core.state is State.TIMED_OUT


def test_impossible_events_raise() -> None:
    with pytest.raises(ValueError, match="Committed"):
        Install().handle(i.Committed(), now=0.0)


def test_rows_map_to_states() -> None:
    assert i.state_of("in_progress", "installing") is State.INSTALLING
    assert i.state_of("failed", "") is State.FAILED
    assert i.may_follow(State.DOWNLOADED, State.INSTALLING)
    assert not i.may_follow(State.QUEUED, State.SUCCEEDED)


class Executions(RuleBasedStateMachine):
    """Any order of events: nothing is activated without having been fetched and cleared."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Install()
        self.fetched = self.cleared = False
        self.activations = 0

    @rule(event=st.sampled_from(list(i._EVENTS)))
    def event(self, event: type) -> None:
        made = event("why") if event in {i.Refused, i.StepFailed} else event()
        try:
            effects = self.core.handle(made, now=0.0)
        except ValueError:
            return
        if i.Activate() in effects:
            assert self.fetched
            assert isinstance(made, i.Cleared)
        self.fetched = (self.fetched or isinstance(made, i.Fetched)) and i.Fetch() not in effects
        if effects:
            assert effects[0] == i.Report(self.core.state, self.core.reason)

    @invariant()
    def every_step_of_ours_has_a_deadline(self) -> None:
        busy = self.core.state in {State.INSTALLING, State.VERIFYING, State.ROLLING_BACK}
        assert (self.core.next_deadline() is not None) == busy


TestExecutions = Executions.TestCase
TestExecutions.settings = settings(max_examples=60, deadline=None)
