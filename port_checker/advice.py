"""What to do about each kind of trouble with a port, in words.

One constant for each situation, in full sentences with fields in braces. The program shows them,
and so may a page.
"""

import re
from typing import Final

from port_checker.connect import VerdictKind
from port_checker.tls import TlsVerdictKind


def sentence(text: str) -> str:
    """Drop the full stop after somebody else's words that end with a stop of their own."""
    return re.sub(r"([.?!])[.]$", r"\1", text)


# This machine listened, and no connection reached the listener.

OWN_FIREWALL = (
    "The connections arrived, and this machine's own firewall turned them away: allow the port "
    "there (nft list ruleset, iptables -S, ufw status)."
)
OWN_FIREWALL_FIRST = (
    "This machine has the address and listened, but the connections did not get through: check "
    "this machine's own firewall first (nft list ruleset, iptables -S, ufw status), then the "
    "firewall of your hosting company or network."
)
NETWORK_FIREWALL = (
    "Nothing arrived at this machine, which has the address itself: check the firewall in front of "
    "it, your router's or your hosting company's (a security group, say)."
)
NOT_FORWARDED = (
    "The address refuses the connection, and nothing arrived at this machine: forward the port "
    "(TCP) to its present address on your router."
)
REFUSED = (
    "The address refuses the connection: forward the port to this machine on your router. If you "
    "have, check this machine's own firewall."
)
NOTHING_ARRIVED = (
    "Nothing arrived at this machine: forward the port (TCP) to its present address on your "
    "router, and allow it in the router's firewall."
)
TIMED_OUT = (
    "The connections get lost on the way: forward the port to this machine on your router, and "
    "allow it in the router's firewall and in this machine's."
)
ROUTER_REJECTS = (
    "A router on the way rejects the connections: allow the port in your router's firewall, and "
    "check that it forwards to this machine's present address."
)
IN_CONTAINER = (
    "Nothing arrives in this container: publish the port to it (-p with Docker and Podman), or run "
    "this on the host's network (--network host). If it is published, forward it to the host on "
    "your router, and allow it in the host's firewall."
)
BEHIND_VPN = (
    "This machine's traffic leaves through a VPN ({interface}), and the VPN's exit does not pass "
    "the connections on: give your own public address with --ip and check that, let the provider "
    "bypass the VPN, or have the VPN forward the port."
)
BEHIND_PROVIDERS_NAT = (
    "Nothing arrives at this machine, nor can it: its internet provider's own NAT does not pass "
    "the connections on, as described below."
)
NOT_IN_SHARE = (
    "Nothing arrived at this machine, nor can it: your internet provider gives this port of the "
    "address to another customer, as described below."
)
XDP_FIRST = (
    "A program at {interface} of this machine (XDP) sees packets before all else and may drop "
    "them: allow the port there first (bpftool net shows it)."
)
IN_CLOUD = (
    "Nothing arrives at this machine: allow the port in your cloud's firewall (security group, "
    "network rules), then in this machine's own."
)
BANNED = (
    "Earlier connections got through and this one did not: a defence against port scans seems to "
    "have banned the server, as described below. That does not show whether the port is open."
)
CALLER_HIDDEN = (
    "The address that was checked is probably not this machine's but that of a NAT in front of the "
    "server: give this machine's public address with --ip."
)

REACHED_FROM_SOME_PLACES = (
    "The port can be reached from some places and not from most: a firewall lets in connections "
    "from certain addresses alone, or a network on the way keeps others out. Allow the port for "
    "all addresses in this machine's firewall and in that of your router, hosting company or "
    "network."
)

# Connections were made, but not to this port of this machine.

ANSWERED_ELSEWHERE = (
    "Something else answered instead of this machine (another machine, a proxy, a firewall that "
    "accepts everything): forward the port to this machine."
)
ANSWERED_IN_FRONT = (
    "Something in front of this machine answered in its place (a protection against attacks, or a "
    "firewall or proxy that accepts everything): let your router, hosting company or network pass "
    "the port on to this machine."
)
REDIRECTED_HERE = (
    "The connections arrive at this machine, but its translation rules lead them to another "
    "program: remove those for this port (nft list ruleset, iptables -t nat -S)."
)
PASSED_ON = (
    "The connections arrive, and this machine passes them on to {address} (a container, say): "
    "stop the container or the rule that publishes the port (docker ps, iptables -t nat -S, nft "
    "list ruleset), or use another port."
)
CONTAINER_SILENT = (
    "The connections arrive, and this machine passes them on to {address} (a container, say), "
    "where nothing accepts them: check the program there."
)
ARRIVES_UNUSED = (
    "Connections to this port arrive at port {port} of this machine, on which nobody listens: "
    "correct the forward on your router."
)
CROSSED = (
    "Connections to this port arrive at another port of this machine: correct the forward on your "
    "router."
)
WAY_BACK = (
    "Connections arrive here, but this machine's replies get lost: check its firewall for outgoing "
    "traffic, and its routes."
)
WAY_BACK_FIRST = (
    "Connections arrive here, but the replies get lost: check this machine's firewall for outgoing "
    "traffic and its routes first, then your router's firewall."
)
REPLIES_LOST = (
    "Connections arrive here and this machine replies, but the replies get lost on the way: check "
    "the firewall of your router or network, and that replies leave by the way that connections "
    "come (with two routers or a VPN, they may not)."
)
REPLIES_ELSEWHERE = (
    "The connections arrive at {interface}, but this machine's replies leave by {other} (a VPN's "
    "route, say) and get lost: let replies leave by {interface} (a rule by source address, ip "
    "rule), or let the provider bypass {other}."
)
REVERSE_PATH = (
    "The connections arrive at {interface}, and this machine drops them because replies would "
    "leave by {other} (a VPN's route, say): set net.ipv4.conf.all.rp_filter=2 for IPv4, or a rule "
    "by which replies leave by {interface} (ip rule)."
)

# This machine could not listen.

IN_USE = (
    "A program on this machine listens on the port but is not reached: allow the port in this "
    "machine's firewall{and_router}."
)
AND_ROUTER = ", and forward it on your router"
IN_USE_LOCALLY = (
    "A program on this machine listens on the port, but only on {addresses}: let it listen on all "
    "addresses."
)
IN_USE_OTHER_FAMILY = (
    "A program on this machine listens on the port, but not over {family}: let it listen on all "
    "addresses of both families."
)
IN_USE_NOT_ACCEPTING = (
    "A program on this machine listens on the port but does not accept its connections "
    "({queued} are waiting): restart it."
)
IN_USE_NOT_LISTENING = (
    "A program on this machine holds the port but does not listen on it: start it properly, or end "
    "it."
)
IN_USE_BY_CONNECTION = (
    "A connection that a program accepted before still holds the port, though nothing listens on "
    "it any more: end it (ss -tnp 'sport = :{port}' shows whose it is), or wait until it ends."
)
OUTGOING_CONNECTION = (
    "An outgoing connection of this machine has taken the port, and the provider's software could "
    "not listen on it either: reserve the port as described below, and try again."
)
NOT_PERMITTED = (
    "You are not allowed to listen on this port: use ports from 1024 up, or run this as root "
    "(CAP_NET_BIND_SERVICE)."
)
NOT_PERMITTED_HERE = (
    "You are not allowed to listen on this port: lower net.ipv4.ip_unprivileged_port_start to 1024 "
    "(sysctl), or run this as root; where a sandbox forbids it, run this outside."
)
NO_FAMILY = (
    "This machine has no {family}, or it is switched off: check over the other IP version, or "
    "enable it (sysctl net.ipv6.conf.all.disable_ipv6)."
)
CHECK_RUNNING = "Another check of this machine is running on the port: wait until it has ended."
FAILED = "This machine could not listen on the port: check whether it is out of files or memory."

# No server has a verdict.

NOT_CHECKED = "No server has checked this port: {reason}."
SERVER_CANNOT = (
    "The server may not connect to this port itself, which says nothing about yours: ask another "
    "server, or use another port."
)

# A certificate was checked. The page shows these, too, wherever its browser runs.

CERTIFICATE_EXPIRED = (
    "The certificate has expired: renew it, and let the program that serves it load the new one."
)
CERTIFICATE_FOR_ANOTHER = (
    "The certificate is for other addresses or names: get one that has {ip} among its alternative "
    "names of type IP address. If your provider serves that already, your router forwards the "
    "port to another machine."
)
CERTIFICATE_NOT_YET_VALID = (
    "The certificate becomes valid later: check the clock of the machine that issued it."
)
CERTIFICATE_OF_UNKNOWN_AUTHORITY = (
    "The world does not trust the issuer of the certificate: get one from a public authority, not "
    "from its staging environment, and serve the intermediate certificate with it."
)
CERTIFICATE_REJECTED = "The certificate cannot be trusted: get another from a public authority."
NOT_TLS = (
    "The port answers, but not with TLS (with plain HTTP, say): forward it to the port on which "
    "your provider serves HTTPS."
)
TLS_TOO_OLD = "The program that serves the port speaks only TLS 1.1 or earlier: update it."
TLS_HANDSHAKE_FAILED = (
    "The port accepts connections, but the TLS handshake fails: check that the program to which it "
    "leads serves HTTPS, and that it still answers."
)

# For each kind of verdict on a TLS endpoint that others could connect to.
FOR_TLS: Final = {
    TlsVerdictKind.EXPIRED: CERTIFICATE_EXPIRED,
    TlsVerdictKind.MISMATCH: CERTIFICATE_FOR_ANOTHER,
    TlsVerdictKind.NOT_YET_VALID: CERTIFICATE_NOT_YET_VALID,
    TlsVerdictKind.UNKNOWN_AUTHORITY: CERTIFICATE_OF_UNKNOWN_AUTHORITY,
    TlsVerdictKind.UNTRUSTED: CERTIFICATE_REJECTED,
    TlsVerdictKind.NOT_TLS: NOT_TLS,
    TlsVerdictKind.TOO_OLD: TLS_TOO_OLD,
    TlsVerdictKind.HANDSHAKE_FAILED: TLS_HANDSHAKE_FAILED,
}

# The same, by the provider's machine alone.
NOTHING_SERVES_TLS = (
    "No program of this machine listens on port {port}: start the one that serves HTTPS there."
)
TLS_NOT_CHECKED = "No server has checked this certificate: {reason}."

# What is true of all ports: the notes of a report.

SERVER_HERE = (
    "{url} runs on this machine, so this says nothing about the world: ask a server elsewhere."
)
SERVER_NEARBY = (
    "{url} sees this machine at {ip}, a private address, so this says nothing about the world: ask "
    "a server on the internet."
)
SERVER_BEHIND_SAME_ROUTER = (
    "{url} is in this machine's own network or behind the same router ({remote}), so this says "
    "nothing about the world: ask a server on the internet."
)
NAT_BEFORE_SERVER = (
    "{url} sees this machine at {ip}, a private address that it does not have: a NAT in front of "
    "the server hides who asks. Give this machine's public address with --ip."
)
ADDRESSES_DIFFER = "The servers see this machine at different addresses: {addresses}."
SHARED_ADDRESS = (
    "Nothing got through to {ip}, which is not an address of this machine. If your router's own "
    "internet address is another one (100.64.0.0 to 100.127.255.255, or private), your internet "
    "provider shares {ip} among its customers (CGNAT), and forwards on your router cannot work: "
    "ask it for a public address, or use IPv6."
)
PORTS_SHARED = (
    "Only {ports} got through, in aligned blocks of {size} at equal distances: your internet "
    "provider gives each customer only some ports of {ip} (MAP-E, v6plus). Use those, ask it for "
    "an address of your own, or use IPv6."
)
PORTS_PERHAPS_SHARED = (
    "Only {ports} got through, an aligned block of {size}. If you have forwarded the others, too, "
    "your internet provider gives each customer only some ports of {ip} (MAP-E, v6plus): use "
    "those, ask it for an address of your own, or use IPv6."
)
ADDRESS_CHANGED = (
    "This machine's address changed from {before} to {after} during the check (a new one of your "
    "internet provider, or a second uplink), so the results for {before} may be out of date: check "
    "again."
)
LOW_PORTS_BLOCKED = (
    "Others got through, but not {ports}: many internet providers block well-known ports such as "
    "25, 80, 443 and 445. If you have forwarded them, use ports from 1024 up."
)
LOOPED_BACK = (
    "Your router loops connections to {ip} back to this machine (hairpin NAT): your own network "
    "reaches it at that address, too."
)
NOT_LOOPED_BACK = (
    "Your router does not loop connections to {ip} back (no hairpin NAT): from your own network "
    "the provider cannot be reached at that address, though the world reaches it. A test from "
    "inside fails."
)
SHARED_ADDRESS_HERE = (
    "This machine has {local}, an address that internet providers share out behind their own NAT "
    "(CGNAT), so forwards cannot work: ask your internet provider for a public address, or use "
    "IPv6."
)
TEMPORARY_ADDRESS = (
    "{ip} is a temporary address, which this machine gives up within hours or days (RFC 8981): let "
    "the provider use a stable one ({stable}), and check that with --ip."
)
SERVERS_DISAGREE = "{url} cannot reach {ports} at {ip} ({error}), though another server can."
CONNECTION_LIMIT = (
    "{count} of the ports answered only when a few were asked for at a time: a firewall or "
    "router limits how many new connections it lets in per second (OpenWrt: SYN-flood "
    "protection). Raise that limit."
)
SERVER_BANNED = (
    "The first {reached} connections of {url} got through, and then no more did: it looks as if a "
    "defence against port scans on this machine or your router (fail2ban, psad, lfd of CSF, "
    "portsentry, a router's intrusion prevention) has banned {peer}. Exempt that address, wait "
    "until the ban ends, and check again."
)
FORWARDS_CROSSED = (
    "Forwards are crossed: connections to {outer} arrive at {inner} of this machine. If that is "
    "what you want, check {pairs}."
)
RESERVE_PORTS = (
    "So that outgoing connections leave these ports alone: "
    "sysctl -w net.ipv4.ip_local_reserved_ports={ports} (and put it into /etc/sysctl.conf)."
)

READ_AS_FORWARD = (
    "{word} is one port, {low}, that is forwarded to {high}. If you mean the ports from {low} to "
    "{high}, write {low}-{high}."
)
READ_AS_LIST = "{word} is two ports, {low} and {high}. If you mean one, write {number}."

# The advice that blames what is in front of this machine, where nothing got through to it.
NOTHING_GOT_THROUGH = {
    NOT_FORWARDED,
    REFUSED,
    NOTHING_ARRIVED,
    TIMED_OUT,
    ROUTER_REJECTS,
    BEHIND_PROVIDERS_NAT,
}

# For the page in a browser, which cannot listen: whether anything runs on a port it does not know.
PAGE_REACHABLE = (
    "Something accepts connections there. If your provider is not running yet, it is another "
    "program or another machine."
)
PAGE_ALL_REACHABLE = "Your provider can work with these ports: start it, if it is not running yet."
PAGE_NEARBY = (
    "{ip} is a private address, so this says nothing about the world: ask a service on the "
    "internet."
)
PAGE_REFUSED = (
    "The address answers, but nothing accepts connections on this port. Start your provider and "
    "check again. If it is running, forward the port to its machine in your router."
)
PAGE_TIMED_OUT = (
    "Nothing answers. Allow the port in the firewall of the machine that your provider runs on, "
    "and forward it to that machine in your router."
)
PAGE_UNREACHABLE = (
    "A router on the way could not or would not deliver the connection. Check the firewall of your "
    "router, or ask your internet provider."
)
FOR_PAGE: Final = {
    VerdictKind.OPEN: PAGE_REACHABLE,
    VerdictKind.REFUSED: PAGE_REFUSED,
    VerdictKind.TIMED_OUT: PAGE_TIMED_OUT,
    VerdictKind.UNREACHABLE: PAGE_UNREACHABLE,
    VerdictKind.OTHER: PAGE_UNREACHABLE,
}
PAGE_CERTIFICATE_VALID = (
    "Everybody who connects to your address can trust it. Renew it before then."
)
