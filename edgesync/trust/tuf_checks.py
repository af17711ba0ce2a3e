"""python-tuf's checks without its HTTP client.

``tuf.ngclient``'s package imports a fetcher, and with it urllib3, http and email: 2.4 MB of memory in every agent for
code that is never called, since metadata comes from peers and brokers. Its package module is therefore put in place
without being run; the submodules used here are imported from it as usual. Private names: the distribution pins tuf.
"""

import importlib.util
import sys

if "tuf.ngclient" not in sys.modules:
    _spec = importlib.util.find_spec("tuf.ngclient")
    assert _spec is not None
    sys.modules["tuf.ngclient"] = importlib.util.module_from_spec(_spec)

from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

__all__ = ["EnvelopeType", "TrustedMetadataSet"]
