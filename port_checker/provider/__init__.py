"""The provider's side: can the world reach this machine, and if not, what to do about it.

As a library::

    report = await verify([7466, 50800], servers=["https://checker.example"])
    for port in report.ports:
        print(port.port, port.reachable, port.advice)

How a check goes, and where each part of it is. Only ``verify`` knows the whole flow:

1. Listen on the ports (``listeners``) and at the interfaces (``evidence``, where this process may).
2. Ask the servers (``remote``) for this machine's address, and then about the ports.
3. Find out which connections came from the servers (``origin``): only those count.
4. Ask again about what is unclear (``second_look``): is the server banned, are connections limited,
   are forwards crossed? The phases while the listeners are open are in ``phases``.
5. Judge each port by what was seen here and what the servers say (``report``), given where this
   machine is (``place``), and say what is true of all ports (``notes``).
6. Show the report (``lines``, or ``screen`` on a terminal), or how it changes (``watch``).
"""

from port_checker.connect import Verdict
from port_checker.provider.remote import Waits
from port_checker.provider.report import PortReport, Report, ServerReport, TlsAnswer, TlsReport
from port_checker.provider.verify import verify

__all__ = [
    "PortReport",
    "Report",
    "ServerReport",
    "TlsAnswer",
    "TlsReport",
    "Verdict",
    "Waits",
    "verify",
]
