"""A staged bundle against a naive model: whatever is written, flushed, killed, cut, edited or read, it never lies.

The model is a set of piece numbers: what was written and not spoilt since.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from device.bundle_store import BundleStore, StagedBundle
from device.state import StateDatabase
from device.tree_map import TreeMap
from edgesync import limits
from edgesync.errors import PieceHashMismatchError, TreeDamagedError
from tests.crash.builders import build, read_tree

FILES = {
    "a": b"".join(bytes([n + 1]) * 512 for n in range(5)),
    "d/b": b"".join(bytes([n + 1]) * 512 for n in range(3, 9)),
    "d/same": bytes([1]) * 512,
    "e": b"x" * 100,
    "empty": b"",
}
BUNDLE = build(FILES, piece_bytes=512)
MAP = TreeMap(BUNDLE.manifest)
PIECES = st.integers(0, len(BUNDLE.pieces) - 1)


class StagedBundleMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="staged-"))
        self.boot = 0
        self.good: set[int] = set()
        self.spoilt: set[int] = set()
        self.open()

    def open(self) -> None:
        limits.RESERVE_BYTES, kept = 4096, limits.RESERVE_BYTES  # type: ignore[misc]
        self.state = StateDatabase.open(self.directory / "state.db")
        self.store = BundleStore.open(self.directory, self.state, boot_id=str(self.boot))
        limits.RESERVE_BYTES = kept  # type: ignore[misc]
        self.staged: StagedBundle = self.store.begin(BUNDLE.data, BUNDLE.manifest)

    def teardown(self) -> None:
        self.store.abandon()
        self.state.close()
        shutil.rmtree(self.directory)

    def file(self, number: int) -> Path:
        return self.staged.root / "tree" / MAP.files[number]

    @rule(piece=PIECES)
    def write(self, piece: int) -> None:
        fresh = self.staged.write_piece(piece, BUNDLE.pieces[piece])
        if fresh:
            self.good.add(piece)
            self.spoilt.discard(piece)

    @rule(piece=PIECES, wrong=st.binary(max_size=600))
    def write_wrong(self, piece: int, wrong: bytes) -> None:
        try:
            assert not self.staged.write_piece(piece, wrong) or wrong == BUNDLE.pieces[piece]
        except PieceHashMismatchError:
            assert wrong != BUNDLE.pieces[piece]

    @rule()
    def flush(self) -> None:
        for piece in self.staged.flush():
            assert piece in self.staged.durable
        assert not self.staged.pending_bytes

    @rule(piece=PIECES)
    def read(self, piece: int) -> None:
        data = self.staged.read_piece(piece)
        assert data is None or data == BUNDLE.pieces[piece]
        if piece in self.good - self.spoilt:
            assert data is not None

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        held = self.staged.have.copy()
        if clean:
            self.store.close()
        else:
            self.store.abandon()
        self.state.close()
        self.open()
        # The page cache survived: no piece that was held and is not spoilt is lost by it.
        for piece in held:
            assert piece in self.staged.have or piece in self.spoilt

    @rule()
    def lose_power(self) -> None:
        """What was synced stays; what was not is zeros, here in whole files."""
        durable = self.staged.durable.copy()
        self.staged.close_files()
        for number in range(len(MAP.files)):
            if self.file(number).exists():
                with self.file(number).open("r+b") as stream:
                    for piece, offset in MAP.pieces_of(number):
                        if piece not in durable and piece not in self.spoilt:
                            stream.seek(offset)
                            stream.write(bytes(MAP.piece_lengths[piece]))
        self.good &= set(durable)
        self.store.abandon()
        self.state.close()
        self.boot += 1
        self.open()

    @rule(
        number=st.integers(0, len(FILES) - 1), how=st.sampled_from(["delete", "truncate", "edit"])
    )
    def spoil(self, number: int, how: str) -> None:
        if not self.file(number).exists() or not MAP.file_sizes[number]:
            return
        self.staged.close_files()
        if how == "delete":
            self.file(number).unlink()
        elif how == "truncate":
            self.file(number).write_bytes(b"")
        else:
            self.file(number).write_bytes(b"!" * MAP.file_sizes[number])
        self.spoilt |= {piece for piece, _ in MAP.pieces_of(number)} & self.good

    @precondition(lambda self: self.staged.have.complete)
    @rule()
    def activate(self) -> None:
        try:
            path = self.staged.activate()
        except TreeDamagedError:
            assert self.spoilt
            self.good -= self.spoilt
            self.spoilt.clear()
            return
        assert read_tree(path) == FILES
        self.store.close()
        self.state.close()
        shutil.rmtree(self.directory)
        self.directory.mkdir()
        self.good.clear()
        self.spoilt.clear()
        self.open()

    @invariant()
    def holds_no_more_than_was_written(self) -> None:
        assert set(self.staged.have) <= self.good
        assert set(self.staged.durable) <= set(self.staged.have)

    @invariant()
    def what_is_claimed_hashes_at_every_place(self) -> None:
        claimed = self.state.bits(BUNDLE.digest, len(BUNDLE.pieces))
        assert set(claimed) == set(self.staged.durable)
        for piece in set(claimed) - self.spoilt:
            for number, offset in MAP.occurrences(piece):
                data = self.file(number).read_bytes()[offset : offset + MAP.piece_lengths[piece]]
                assert hashlib.sha256(data).digest() == MAP.piece_id(piece)


StagedBundleMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestStagedBundle = StagedBundleMachine.TestCase
