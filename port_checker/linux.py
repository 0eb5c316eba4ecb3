"""How many files this process may open: sockets are files."""

import os
import resource


def raise_descriptor_limit() -> int:
    """Raise this process's limit of open files to its hard bound, and return that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def descriptors_left() -> int:
    """Return how many more files this process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit - len(os.listdir("/proc/self/fd"))
