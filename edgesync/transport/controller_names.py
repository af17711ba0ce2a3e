"""The congestion controllers by name, for settings: nothing is imported that sends anything."""

from typing import Final

AUTO: Final = "auto"
CLASSES: Final = ("bbr", "lan", "background", "cubic", "reno")
SETTINGS: Final = (AUTO, *CLASSES)
"""What configuration may name."""
