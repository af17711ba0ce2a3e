"""A manifest as flat arrays: which bytes of which file each piece is, in about 100 bytes a file.

A parsed ``Manifest`` of 100,000 files holds some 40 MB of Python objects; a device keeps this instead for every bundle
it serves. It checks nothing (``edgesync.manifest.parse`` has) beyond the bound on occurrences, and does no I/O.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from edgesync import limits
from edgesync.errors import VerificationError
from edgesync.ids import PieceId
from edgesync.manifest import Manifest, file_sha256


class Strings(Sequence[str]):
    """An immutable list of strings in one buffer."""

    __slots__ = ("_blob", "_ends")

    def __init__(self, values: Iterable[str]) -> None:
        blob = bytearray()
        self._ends = array("I", [0])
        for value in values:
            blob += value.encode()
            self._ends.append(len(blob))
        self._blob = bytes(blob)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        return self._blob[self._ends[index] : self._ends[index + 1]].decode()


class TreeMap:
    """Where every piece of one bundle lies. Files, folders and symlinks go by their position in the manifest.

    Raises VerificationError: the pieces occur more than MAX_OCCURRENCES times in all.
    """

    __slots__ = (
        "_file_first_run",
        "_file_hashes",
        "_occurrence_file",
        "_occurrence_offset",
        "_piece_first_occurrence",
        "_run_count",
        "_run_first",
        "directories",
        "directory_modes",
        "file_modes",
        "file_mutable",
        "file_sizes",
        "files",
        "payload_bytes",
        "piece_ids",
        "piece_lengths",
        "symlink_targets",
        "symlinks",
    )

    def __init__(self, manifest: Manifest) -> None:
        self.payload_bytes = manifest.payload_bytes
        self.piece_ids = manifest.piece_ids
        self.piece_lengths = array("I", manifest.piece_lengths)
        self.directories = Strings(entry.path for entry in manifest.directories)
        self.directory_modes = array("H", (entry.mode for entry in manifest.directories))
        self.symlinks = Strings(entry.path for entry in manifest.symlinks)
        self.symlink_targets = Strings(entry.target for entry in manifest.symlinks)
        self.files = Strings(entry.path for entry in manifest.files)
        self.file_modes = array("H", (entry.mode for entry in manifest.files))
        self.file_sizes = array("Q", (entry.size for entry in manifest.files))
        self.file_mutable = bytes(entry.mutable for entry in manifest.files)
        self._file_hashes = b"".join(file_sha256(manifest, entry) for entry in manifest.files)
        self._file_first_run = array("I", [0])
        self._run_first = array("I")
        self._run_count = array("I")
        occurrences = 0
        for entry in manifest.files:
            for first, count in entry.runs:
                self._run_first.append(first)
                self._run_count.append(count)
                occurrences += count
            self._file_first_run.append(len(self._run_first))
        if occurrences > limits.MAX_OCCURRENCES:
            raise VerificationError(
                f"the manifest's pieces occur {occurrences} times in its files, "
                f"at most {limits.MAX_OCCURRENCES} are allowed"
            )
        self._index_occurrences(occurrences)

    def _index_occurrences(self, occurrences: int) -> None:
        # Counting sort by piece: count, turn counts into first positions, fill.
        counts = array("I", bytes(4 * self.piece_count))
        for first, count in zip(self._run_first, self._run_count, strict=True):
            for piece in range(first, first + count):
                counts[piece] += 1
        self._piece_first_occurrence = array("I", accumulate(counts, initial=0))
        free = array("I", self._piece_first_occurrence[:-1])
        self._occurrence_file = array("I", bytes(4 * occurrences))
        self._occurrence_offset = array("Q", bytes(8 * occurrences))
        for file in range(len(self.files)):
            for piece, offset in self.pieces_of(file):
                position = free[piece]
                free[piece] += 1
                self._occurrence_file[position] = file
                self._occurrence_offset[position] = offset

    @property
    def piece_count(self) -> int:
        return len(self.piece_lengths)

    def piece_id(self, piece: int) -> PieceId:
        return PieceId(self.piece_ids[piece * 32 : piece * 32 + 32])

    def file_sha256(self, file: int) -> bytes:
        return self._file_hashes[file * 32 : file * 32 + 32]

    def occurrences(self, piece: int) -> Iterator[tuple[int, int]]:
        """(file, offset) of each place a piece stands at, in file order; at least one."""
        for position in range(
            self._piece_first_occurrence[piece], self._piece_first_occurrence[piece + 1]
        ):
            yield self._occurrence_file[position], self._occurrence_offset[position]

    def pieces_of(self, file: int) -> Iterator[tuple[int, int]]:
        """(piece, offset) of a file's contents, in order."""
        offset = 0
        for run in range(self._file_first_run[file], self._file_first_run[file + 1]):
            first = self._run_first[run]
            for piece in range(first, first + self._run_count[run]):
                yield piece, offset
                offset += self.piece_lengths[piece]
