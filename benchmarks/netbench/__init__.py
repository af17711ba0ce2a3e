"""What the network benchmarks share: hosts and processes, the contenders, links, results and their pages.

Nothing here imports EdgeSync's daemons: ours runs as the commands an operator types, like everybody else's.
"""
