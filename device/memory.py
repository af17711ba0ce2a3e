"""Giving freed memory back to the system.

glibc keeps what was freed between blocks still in use; on a device with little memory the pages are worth more than the
milliseconds. Does nothing where the C library has no ``malloc_trim`` (musl). Called between a bundle's stages, never in
the middle of a transfer.
"""

import ctypes
import gc

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Collect what is unreachable and return free pages; some ten milliseconds, so not on an event loop."""
    gc.collect()
    if _trim is not None:
        _trim(0)
