"""Where this machine is, told from files and interfaces."""

from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

import pytest

from port_checker.provider.place import router_of
from port_checker.provider.report import Router
from tests.support.namespace import in_namespace, needs_root

DMI = "sys/class/dmi/id"


@pytest.mark.parametrize(
    ("interface", "files", "expected"),
    [
        ("eth0", {}, Router.ROUTER),
        ("eth0", {".dockerenv": ""}, Router.ROUTER),  # a build machine, or the host's network
        ("wg0", {}, Router.VPN),
        ("tun0", {".dockerenv": ""}, Router.VPN),
        ("eth0", {f"{DMI}/sys_vendor": "Amazon EC2\n"}, Router.CLOUD),
        ("eth0", {f"{DMI}/product_name": "Google Compute Engine\n"}, Router.CLOUD),
        ("eth0", {f"{DMI}/sys_vendor": "Microsoft Corporation\n"}, Router.ROUTER),  # Hyper-V
        ("eth0", {f"{DMI}/sys_vendor": "LENOVO\n"}, Router.ROUTER),
    ],
)
def test_what_stands_before_this_machine(
    tmp_path: Path, interface: str, files: Mapping[str, str], expected: Router
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert router_of(interface, ip_address("192.168.1.2"), tmp_path) is expected


CONTAINER_SCRIPT = """
import tempfile
from ipaddress import ip_address
from pathlib import Path
from port_checker.linux import interface_kind
from port_checker.provider.place import router_of
bare, marked, grouped = (Path(tempfile.mkdtemp()) for _ in range(3))
(marked / "run").mkdir()
(marked / "run/.containerenv").touch()
(grouped / "proc/1").mkdir(parents=True)
(grouped / "proc/1/cgroup").write_text("0::/docker/0123\\n")
print(interface_kind("veth7"), interface_kind("lo"))
for root in bare, marked, grouped:
    for local in "172.17.0.2", "192.168.1.2":
        print(router_of("veth7", ip_address(local), root))
"""


@needs_root
def test_a_container_has_a_mark_and_a_containers_network() -> None:
    setup = "ip link add veth7 type veth peer veth8"
    first, *routers = in_namespace(CONTAINER_SCRIPT, setup).splitlines()
    assert first == "veth "
    assert routers == ["router", "router", "container", "router", "container", "router"]
