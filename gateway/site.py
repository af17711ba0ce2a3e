"""Which LAN a device is on, as far as a gateway can tell: its label, else the address it is seen at.

Devices behind one translated address share a LAN as a rule, so the whole address is the site; a device seen at an
address of its own is put with its neighbours, /24 or /64. It is a guess that costs traffic when wrong, never trust:
``device list`` shows it with its reason, and the label ``site`` overrides it.
"""

import ipaddress
from collections.abc import Collection, Mapping

UNKNOWN = "unknown"


def host_of(address: str) -> str:
    """``HOST`` of ``HOST:PORT`` or ``[V6]:PORT``, without scope."""
    host = address.rpartition(":")[0] if address.count(":") == 1 or "]" in address else address
    return host.strip("[]").partition("%")[0]


def site_of(
    labels: Mapping[str, str], observed: str, local_addresses: Collection[str] = ()
) -> tuple[str, str]:
    """The site and why: ``(site, "label" | "address" | "translated address" | "never seen")``."""
    if site := labels.get("site"):
        return site, "label"
    try:
        address = ipaddress.ip_address(host_of(observed))
    except ValueError:
        return UNKNOWN, "never seen"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    own = {host_of(local) for local in local_addresses}
    # Not translated: the device has this address itself, or it is one no translator would show us.
    if str(address) in own or not address.is_global:
        length = 24 if address.version == 4 else 64
        return str(ipaddress.ip_network((address, length), strict=False)), "address"
    return f"{address}/{address.max_prefixlen}", "translated address"
