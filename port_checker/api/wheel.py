"""The wheel of the program, made of what is installed here.

Owners install it from the service, since no package index has it.
"""

import base64
import functools
import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Self

import port_checker

_DISTRIBUTION = "golem-port-checker"

# https://packaging.python.org/specifications/binary-distribution-format
_WHEEL = """\
Wheel-Version: 1.0
Generator: golem-port-checker {version}
Root-Is-Purelib: true
Tag: py3-none-any
"""

# The earliest time that a zip file can have.
_LONG_AGO = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Wheel:
    """A wheel.

    Its bytes depend only on its content: not on when and where it was made, nor on a compressor's
    version. So two services that run the same version hand out the same wheel.

    Attributes:
        name: Of the file.
        content: Its bytes.
        sha256: The hash of these, in hexadecimal digits.
    """

    name: str
    content: bytes
    sha256: str

    @classmethod
    def of_installed(cls) -> Self | None:
        """Make the wheel of the package that is running; None if it has not been installed.

        An editable installation will do. The package's shared data (systemd units, say) is left
        out: only operators need it.
        """
        try:
            installed = distribution(_DISTRIBUTION)
        except PackageNotFoundError:
            return None
        stem = f"golem_port_checker-{installed.version}"
        content = _zip(
            {**_package_files(), **_metadata_files(installed, f"{stem}.dist-info")}, stem
        )
        return cls(f"{stem}-py3-none-any.whl", content, hashlib.sha256(content).hexdigest())


@functools.cache  # once in a process, for all its applications
def installed_wheel() -> Wheel | None:
    """Return ``Wheel.of_installed()``."""
    return Wheel.of_installed()


def _package_files() -> dict[str, bytes]:
    package = Path(port_checker.__file__).parent
    return {
        path.relative_to(package.parent).as_posix(): path.read_bytes()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _metadata_files(installed: Distribution, directory: str) -> dict[str, bytes]:
    files = {f"{directory}/WHEEL": _WHEEL.format(version=installed.version).encode()}
    for path in installed.files or ():
        # What else is there describes the installation, not the package.
        if path.name in ("METADATA", "entry_points.txt") or path.parent.name == "licenses":
            _, _, name = path.as_posix().partition(".dist-info/")
            files[f"{directory}/{name}"] = path.read_binary()
    return files


def _zip(files: dict[str, bytes], stem: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in [
            *sorted(files.items()),
            (f"{stem}.dist-info/RECORD", _record(files, stem)),
        ]:
            entry = zipfile.ZipInfo(name, _LONG_AGO)
            entry.external_attr = 0o100644 << 16  # a file that everybody may read
            entry.create_system = 3  # Unix
            archive.writestr(entry, content)
    return buffer.getvalue()


def _record(files: dict[str, bytes], stem: str) -> bytes:
    """Return the list of all files with their hashes; its last line is for itself, without one."""

    def lines() -> Iterator[str]:
        for name, content in sorted(files.items()):
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            yield f"{name},sha256={digest.decode()},{len(content)}\n"
        yield f"{stem}.dist-info/RECORD,,\n"

    return "".join(lines()).encode()
