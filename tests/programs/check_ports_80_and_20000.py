"""Check two ports of this machine with a server of its own, and print what is known of them."""

from tests.support.scripted import check
from tests.support.service import serve

if __name__ == "__main__":
    with serve(retries=1) as client:
        report = check([80, 20000], str(client.base_url))
    for port in report.ports:
        print(port.port, port.local, port.reachable, port.confirmed, port.advice)  # noqa: T201  # its result
