"""The provider's side: can the world reach this machine, and if not, what to do about it.

As a library::

    report = await verify([7466, 50800], servers=["https://checker.example"])
    for port in report.ports:
        print(port.port, port.reachable, port.advice)
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
