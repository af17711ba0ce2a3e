"""Short cuts through aioquic for an established connection that moves bulk data; everything unusual goes to stock code.

``protection`` computes header masks of many packets at once, ``recovery`` keeps slim records of sent packets and merges
what an ACK says, ``receiving`` takes a batch of datagrams, ``sending`` makes many at once. Nothing here decides what is
allowed: the bounds are those of ``edgesync.transport.quic``, and both peers see the same bytes, frames and errors with
or without these short cuts (``python -m tests.differential``).
"""
