from pathlib import Path

from edgesync.testing import state_docs


def test_state_machines_doc_is_current() -> None:
    path = Path(__file__).parents[2] / "docs" / "state-machines.md"
    assert path.read_text(encoding="utf-8") == state_docs.render(), "run: make docs"


def test_tables_are_total() -> None:
    for module in state_docs.machines():
        reachable = set(module.TRANSITIONS.values())
        states = type(next(iter(reachable)))
        assert reachable == set(states), f"{module.__name__} has a state nothing leads to"
        overlap = set(module.TRANSITIONS) & set(getattr(module, "IGNORED", ()))
        assert not overlap
