"""sd_notify: telling systemd that a daemon is ready, alive and what it does. Silent where no supervisor listens."""

import os
import socket


def notify(*lines: str) -> None:
    """Send ``READY=1``, ``STATUS=…``, ``WATCHDOG=1`` or ``STOPPING=1``; never raises."""
    where = os.environ.get("NOTIFY_SOCKET")
    if not where:
        return
    target = "\0" + where[1:] if where.startswith("@") else where
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto("\n".join(lines).encode(), target)
    except OSError:
        return


def watchdog_interval_s() -> float | None:
    """Seconds between ``WATCHDOG=1`` messages, half of what systemd allows; None without a watchdog."""
    micros = os.environ.get("WATCHDOG_USEC")
    if not micros or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(micros) / 2_000_000
