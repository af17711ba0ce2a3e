"""What gateways and devices share: identities, limits, manifests, trust, wire messages, transport, storage.

It imports neither side; both sides import it.
"""

__version__ = "0.1.0"
