"""What must be true of every run, whatever its faults: checked at the end, and after each event where it is cheap."""

from simulations.actors import Content, Device


def check(devices: list[Device], content: Content) -> None:
    """Raises AssertionError naming the device that broke a rule."""
    total = content.wire_bytes
    for device in devices:
        if not device.honest:
            continue
        held = sum(content.carried(piece) for piece in device.have)
        received = device.bytes_gateway + device.bytes_peers
        assert received - device.bytes_duplicate == held, f"{device.key} holds what it did not get"
        assert held <= total
        if device.finished_at is not None:
            assert device.have.complete, f"{device.key} finished without every piece"
        assert device.core.picker.missing_count == len(content.lengths) - device.have.count


__all__ = ["check"]
