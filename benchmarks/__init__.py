"""``make bench``: side by side with the published golem-port-checker and a bare connect loop.

Everything stays on this machine's loopback. Linux only, as it is epoll and /proc that are used.
"""

HOST = "127.0.0.1"


class BenchmarkFailed(Exception):
    """There is no figure, or none that could be believed; the message says why."""
