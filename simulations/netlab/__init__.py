"""EdgeSync's real programs on impaired networks, in network namespaces of this machine.

Links are carried by a user-space forwarder (``forwarder.c``: kernels without netem have no delay and loss of their
own), everything else is the kernel's: bridges, routers, NAT, sockets. Programs are started by command, as an operator
would; nothing here imports what gateways and devices are made of. It needs root, and touches only namespaces whose
names begin with ``nl`` and a run's number.
"""
