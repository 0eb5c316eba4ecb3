"""The provider's side: is this machine reachable, and what is to be done about it?

As a library::

    report = await verify([7466, 50800], servers=["https://checker.example"])
    for port in report.ports:
        print(port.port, port.reachable, port.advice)
"""

from port_checker.connect import Verdict
from port_checker.provider.report import PortReport, Report, ServerReport
from port_checker.provider.verify import verify

__all__ = ["PortReport", "Report", "ServerReport", "Verdict", "verify"]
