"""The demonstration: one gateway and some agents as ordinary processes on loopback, driven by ordinary commands.

It has no way into the daemons but the commands and the agent's socket that an operator has.
"""
