"""``make bench``: side by side with other programs that do the same. And what hostile callers cost.

All traffic stays on this machine's loopback, or in network namespaces (``hostile``). Linux only,
since it uses epoll and /proc.
"""

HOST = "127.0.0.1"


class BenchmarkFailed(Exception):
    """Something could not be measured, or not reliably; the message says why."""
