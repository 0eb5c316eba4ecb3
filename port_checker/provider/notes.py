"""The notes of a report: what is true of all ports, or of the servers."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from port_checker import advice
from port_checker.addresses import MIN_UNPRIVILEGED_PORT, Address
from port_checker.linux import ephemeral_ports, own_addresses, reserved_ports
from port_checker.provider.origin import Contact, Nearness, is_own
from port_checker.provider.place import Share, is_shared, place_of
from port_checker.provider.report import PortPair, PortReport, port_ranges

# The advice on ports at which nothing arrived.
_LOST = {*advice.NOTHING_GOT_THROUGH, advice.NETWORK_FIREWALL, advice.IN_CLOUD}


@dataclass(frozen=True)
class Findings:
    """What was found out besides the results of each port.

    Attributes:
        reached_in_groups: How many ports answered only when a few were asked for at a time.
        banned: How many connections of each server got through before it was banned as a scanner,
            as it seems; by URL.
        moved: The address before and after, if it changed during the check.
        share: The customer's part of an address whose ports are shared out.
        loops_back: This machine's public address, and whether the router loops it back; None if
            that is unknown.
    """

    reached_in_groups: int = 0
    banned: Mapping[str, int] = field(default_factory=dict)
    moved: tuple[Address, Address] | None = None
    share: Share | None = None
    loops_back: tuple[Address, bool] | None = None


def notes(
    contacts: Sequence[Contact], ports: Sequence[PortReport], findings: Findings
) -> Iterator[str]:
    """Yield the notes of a report.

    Args:
        contacts: The servers.
        ports: The results.
        findings: What else was found out.
    """
    for contact in contacts:
        yield from _notes_on_server(contact)
    addresses = {contact.url: str(contact.address) for contact in contacts if contact.address}
    if len(set(addresses.values())) > 1:
        listed = ", ".join(f"{ip} ({url})" for url, ip in addresses.items())
        yield advice.ADDRESSES_DIFFER.format(addresses=listed)
    yield from _temporary_addresses(contacts)
    yield from _disagreements(ports, addresses)
    if findings.moved:
        before, after = findings.moved
        yield advice.ADDRESS_CHANGED.format(before=before, after=after)
    else:
        yield from _notes_on_address(contacts, ports, findings)
    yield from _low_ports(ports)
    if findings.reached_in_groups:
        yield advice.CONNECTION_LIMIT.format(count=findings.reached_in_groups)
    for url, reached in findings.banned.items():
        contact = next(contact for contact in contacts if contact.url == url)
        peer = next(iter(contact.peers), contact.remote)
        yield advice.SERVER_BANNED.format(url=url, reached=reached, peer=peer)
    crossed = [PortPair(port.port, port.arrives_at) for port in ports if port.arrives_at]
    if crossed:
        yield advice.FORWARDS_CROSSED.format(
            outer=port_ranges(PortPair(pair.outer, pair.outer) for pair in crossed),
            inner=port_ranges({PortPair(pair.inner, pair.inner) for pair in crossed}),
            pairs=port_ranges(crossed),
        )
    taken = {port.inner for port in ports if port.local == "outgoing connection"}
    if taken & set(ephemeral_ports()):
        ours = port_ranges(PortPair(port.inner, port.inner) for port in ports)
        both = ",".join(filter(None, [reserved_ports(), ours.replace(" ", "")]))
        yield advice.RESERVE_PORTS.format(ports=both)


def _notes_on_server(contact: Contact) -> Iterator[str]:
    match contact.nearness:
        case Nearness.HERE:
            yield advice.SERVER_HERE.format(url=contact.url)
        case Nearness.PRIVATE:
            yield advice.SERVER_NEARBY.format(url=contact.url, ip=contact.address)
        case Nearness.BEHIND_NAT:
            yield advice.NAT_BEFORE_SERVER.format(url=contact.url, ip=contact.address)
        case Nearness.SAME_NETWORK:
            yield advice.SERVER_BEHIND_SAME_ROUTER.format(url=contact.url, remote=contact.remote)


def _temporary_addresses(contacts: Sequence[Contact]) -> Iterator[str]:
    """Name a checked address that this machine will give up, and those that it keeps."""
    own = own_addresses()
    checked = {contact.address for contact in contacts}
    for each in own:
        if each.temporary and each.address in checked:
            lasting = [
                str(other.address)
                for other in own
                if other.network == each.network and not (other.temporary or other.deprecated)
            ]
            stable = ", ".join(lasting) or "none that this machine has now"
            yield advice.TEMPORARY_ADDRESS.format(ip=each.address, stable=stable)


def _disagreements(ports: Sequence[PortReport], addresses: dict[str, str]) -> Iterator[str]:
    """Name the ports that one server cannot reach and another can."""
    unreached: defaultdict[tuple[str, str | None], list[PortPair]] = defaultdict(list)
    for port in ports:
        if any(verdict.accessible for verdict in port.answers.values()):
            for url, verdict in port.answers.items():
                if not verdict.accessible:
                    unreached[url, verdict.error].append(port.pair)
    for (url, error), pairs in unreached.items():
        yield advice.SERVERS_DISAGREE.format(
            url=url, ports=port_ranges(pairs), ip=addresses.get(url), error=error
        )


def _low_ports(ports: Sequence[PortReport]) -> Iterator[str]:
    """Name the ports that were lost, if all of them are well-known ones."""
    lost = [port.pair for port in ports if port.advice in _LOST]
    if lost and any(port.reachable for port in ports) and max(lost).outer < MIN_UNPRIVILEGED_PORT:
        yield advice.LOW_PORTS_BLOCKED.format(ports=port_ranges(lost))


def _notes_on_address(
    contacts: Sequence[Contact], ports: Sequence[PortReport], findings: Findings
) -> Iterator[str]:
    """Say what the router does with the address, or who else has it."""
    contact = next((contact for contact in contacts if contact.address), None)
    if findings.loops_back:
        own, comes_back = findings.loops_back
        yield (advice.LOOPED_BACK if comes_back else advice.NOT_LOOPED_BACK).format(ip=own)
    if contact and findings.share:
        note = advice.PORTS_SHARED if findings.share.certain else advice.PORTS_PERHAPS_SHARED
        reached = port_ranges(port.pair for port in ports if port.reachable)
        yield note.format(ports=reached, size=findings.share.size, ip=contact.address)
    kinds_of_advice = {port.advice for port in ports if port.answers}
    if not contact or not contact.address or not kinds_of_advice:
        return
    if not kinds_of_advice <= advice.NOTHING_GOT_THROUGH:
        return
    address = contact.address
    if address.version == 6 or not address.is_global or is_own(address):
        return
    if is_shared(local := place_of(contact, address.version).address):
        yield advice.SHARED_ADDRESS_HERE.format(local=local)
    else:
        yield advice.SHARED_ADDRESS.format(ip=address)
