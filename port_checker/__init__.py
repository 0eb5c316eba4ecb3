"""golem-port-checker: tells a provider which of its TCP ports the world can reach."""

__version__ = "1.0.0"
