"""The notes of a report: what is true of all ports, or of the servers."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network

from port_checker import advice
from port_checker.linux import ephemeral_ports, own_addresses, reserved_ports
from port_checker.provider.origin import Contact, Nearness, is_own
from port_checker.provider.report import PortPair, PortReport, port_ranges

_SHARED = IPv4Network("100.64.0.0/10")  # RFC 6598
_DS_LITE = IPv4Network("192.0.0.0/29")  # RFC 7335


def notes(
    contacts: Sequence[Contact],
    ports: Sequence[PortReport],
    retried: int,
    banned: Mapping[str, int],
) -> Iterator[str]:
    """Yield the notes of a report.

    Args:
        contacts: The servers.
        ports: The results.
        banned: The servers that seem to be banned as scanners, and how many of their connections
            got through before.
        retried: How many ports answered only when a few were asked for at a time.
    """
    for contact in contacts:
        yield from _notes_on_server(contact)
    addresses = {contact.url: str(contact.address) for contact in contacts if contact.address}
    if len(set(addresses.values())) > 1:
        listed = ", ".join(f"{ip} ({url})" for url, ip in addresses.items())
        yield advice.ADDRESSES_DIFFER.format(addresses=listed)
    yield from _temporary_addresses(contacts)
    yield from _disagreements(ports, addresses)
    yield from _notes_on_address(contacts, ports)
    if retried:
        yield advice.CONNECTION_LIMIT.format(retried=retried)
    for url, reached in banned.items():
        contact = next(contact for contact in contacts if contact.url == url)
        peer = next(iter(contact.peers), contact.remote)
        yield advice.SERVER_BANNED.format(url=url, reached=reached, peer=peer)
    wrong = [PortPair(port.port, port.arrives_at) for port in ports if port.arrives_at]
    if wrong:
        yield advice.FORWARDS_CROSSED.format(
            outer=port_ranges(PortPair(pair.outer, pair.outer) for pair in wrong),
            inner=port_ranges({PortPair(pair.inner, pair.inner) for pair in wrong}),
            pairs=port_ranges(wrong),
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
    """Name an address that this machine will not keep, and the one that it keeps."""
    own = own_addresses()
    checked = {contact.address for contact in contacts}
    for found in own:
        if found.temporary and found.address in checked:
            lasting = [
                str(other.address)
                for other in own
                if other.network == found.network and not (other.temporary or other.deprecated)
            ]
            stable = ", ".join(lasting) or "none that this machine has now"
            yield advice.TEMPORARY_ADDRESS.format(ip=found.address, stable=stable)


def _disagreements(ports: Sequence[PortReport], addresses: dict[str, str]) -> Iterator[str]:
    """Say of each server what it cannot reach, and another can."""
    unreached: defaultdict[tuple[str, str | None], list[PortPair]] = defaultdict(list)
    for port in ports:
        if any(verdict.accessible for verdict in port.answers.values()):
            for url, verdict in port.answers.items():
                if not verdict.accessible:
                    unreached[url, verdict.error].append(PortPair(port.port, port.inner))
    for (url, error), pairs in unreached.items():
        yield advice.SERVERS_DISAGREE.format(
            url=url, ports=port_ranges(pairs), ip=addresses.get(url), error=error
        )


def _notes_on_address(contacts: Sequence[Contact], ports: Sequence[PortReport]) -> Iterator[str]:
    """Name a shared address, where all that the rows say is that nothing got through to it."""
    contact = next((contact for contact in contacts if contact.address), None)
    answered = [port for port in ports if port.answers]
    if not contact or not contact.address or not answered:
        return
    if not {port.advice for port in answered} <= advice.NOTHING_GOT_THROUGH:
        return
    address, local = contact.address, contact.local
    if address.version == 6 or not address.is_global or is_own(address):
        return
    if isinstance(local, IPv4Address) and (local in _SHARED or local in _DS_LITE):
        yield advice.SHARED_ADDRESS_HERE.format(local=local)
    else:
        yield advice.SHARED_ADDRESS.format(ip=address)
