"""Tests on real sockets: loopback, and network namespaces where loopback is not enough."""
