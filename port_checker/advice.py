"""What to do about each kind of trouble with a port, in words."""

REFUSED = (
    "The address answers, but nothing listens on this port there, or the router forwards it to "
    "another machine: forward it to this one."
)
TIMED_OUT = (
    "A firewall or router drops the connection: allow it in the firewalls, and forward it to this "
    "machine."
)
UNREACHABLE = (
    "A router on the way reports that it cannot or may not deliver: check the address and your "
    "router's firewall."
)
ANSWERED_ELSEWHERE = (
    "Something else answered instead of this machine (another machine, a proxy, a firewall that "
    "accepts everything): forward the port to this one."
)
WAY_BACK = (
    "Connections arrive here, but this machine's replies get lost: check its firewall for outgoing "
    "traffic and its routes."
)
IN_USE = (
    "A program on this machine uses the port but is not reached: check that it listens on all "
    "addresses, that the firewalls allow it, and that the router forwards it."
)
NOT_PERMITTED = (
    "You are not allowed to listen on this port: use ports from 1024 up, or run this as root "
    "(CAP_NET_BIND_SERVICE)."
)
FAILED = "This machine could not listen on the port: check whether it is out of files or memory."
NOT_ASKED = "No server has checked this port: try again later, or ask another server."
