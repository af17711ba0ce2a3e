"""Big real inputs for the acceptance runs, made once a folder: installed packages, and incompressible bytes."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "numpy==2.3.5",
    "scipy==1.16.3",
    "pandas==2.3.3",
    "scikit-learn==1.7.2",
    "sympy==1.14.0",
    "matplotlib==3.10.7",
    "pillow==12.0.0",
)
EXCHANGED = ("numpy==2.3.4",)


def installed_packages(cache: Path) -> tuple[Path, Path]:
    """Two folders of installed packages, over 300 MB each; the second has one package in another version."""
    first, second = cache / "packages-1", cache / "packages-2"
    if not first.exists():
        _install(first, PACKAGES)
    if not second.exists():
        scratch = cache / "scratch"
        _install(scratch, EXCHANGED)
        copy = cache / "packages-2.part"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(first, copy, symlinks=True)
        for entry in scratch.iterdir():
            kept = copy / entry.name
            if kept.is_dir():
                shutil.rmtree(kept)
            shutil.move(entry, kept)
        for stale in copy.glob("numpy-*.dist-info"):
            if stale.name not in {entry.name for entry in scratch.glob("numpy-*")} | {
                "numpy-2.3.4.dist-info"
            }:
                shutil.rmtree(stale)
        shutil.rmtree(scratch)
        copy.rename(second)
    return first, second


def _install(target: Path, packages: tuple[str, ...]) -> None:
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        + ["--only-binary=:all:", "--no-compile", "--target", str(part), *packages],
        check=True,
    )
    part.rename(target)


def incompressible(target: Path, size: int, *, seed: int, files: int = 12) -> Path:
    """A folder of ``size`` random bytes in some files of uneven sizes."""
    if not target.exists():
        rng = random.Random(seed)
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        cuts = sorted(rng.sample(range(1, size), files - 1))
        for number, length in enumerate(
            b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)
        ):
            with (part / f"part-{number:02}.bin").open("wb") as file:
                left = length
                while left:
                    chunk = min(left, 1 << 20)
                    file.write(rng.randbytes(chunk))
                    left -= chunk
        part.rename(target)
    return target


def tree_bytes(root: Path) -> int:
    return sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and not p.is_symlink())
