"""What this machine believes: the fleet's TUF metadata, checked in the order the specification gives.

It takes metadata from anywhere (gateway, peer, broker, file), says what is still missing, and turns a complete, newer
set into a new TrustState; ``Trusted`` is what such a state says about bundles, regions and certificates. The checks
are python-tuf's TrustedMetadataSet. It reads no clock and writes nothing: ``device.trust_store`` keeps states,
``gateway.repository`` makes the metadata. Invariants:

* every file is capped before it is parsed: root and timestamp by a constant, all others by the length and hash the
  file above them names;
* versions never fall; a root commits alone (``add_root``), timestamp, snapshot, targets and delegated together
  (``apply``): a state holds a whole set or none;
* when a root changes the keys of timestamp or snapshot, what was known of them is forgotten, time floor included: that
  is how a fleet recovers from a stolen online key that signed version 2**40 or the year 2099;
* metadata that was accepted stays readable after it expires: it is read again as of the time it was accepted. Expiry
  gates accepting;
* a bundle whose ``custom`` data contradicts its path is not listed;
* a gateway is known by its key in ``trust/regions`` and by nothing else, a device by a certificate of an authority
  listed there. That list stays in force while newer metadata is on its way, else nobody could be asked for it.

Trusted time is ``trusted_time``: the larger of the system clock and the signed floor plus the time this machine has
been running since, and never a clock that is further ahead of that than MAX_CLOCK_AHEAD_S.
"""

from edgesync.trust.files import ISSUED_FIELD, ROOT_FIELD, MetadataUpdate, Want
from edgesync.trust.regions import (
    REGIONS_PATH,
    GatewayEntry,
    RegionEntry,
    Regions,
    encode_regions,
    parse_regions,
)
from edgesync.trust.state import TrustState
from edgesync.trust.update import (
    add_root,
    apply,
    bootstrap,
    pending_roots,
    trusted_time,
    wanted,
)
from edgesync.trust.view import BundleTarget, Trusted, check_manifest, target_path

__all__ = [
    "ISSUED_FIELD",
    "REGIONS_PATH",
    "ROOT_FIELD",
    "BundleTarget",
    "GatewayEntry",
    "MetadataUpdate",
    "RegionEntry",
    "Regions",
    "TrustState",
    "Trusted",
    "Want",
    "add_root",
    "apply",
    "bootstrap",
    "check_manifest",
    "encode_regions",
    "parse_regions",
    "pending_roots",
    "target_path",
    "trusted_time",
    "wanted",
]
