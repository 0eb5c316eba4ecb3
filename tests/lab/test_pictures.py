"""README's pictures of the program."""

import contextlib
import html
import os
import re
import sys
from pathlib import Path

import pytest
from rich.color import parse_rgb_hex
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from port_checker.linux import tcp_sockets
from tests.lab import network
from tests.lab.checks import url_of
from tests.lab.network import Lab
from tests.support.namespace import ROOT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group("lab 2")

# Of the terminals on the pictures: background, text, red and green, in the colours of the page.
THEMES = {
    "light": ("#fcfbf9", "#1d1c1a", "#a3301f", "#0b6353"),
    "dark": ("#171614", "#ebe8e2", "#f59a8b", "#6fd0b8"),
}


def output_on_a_terminal(lab: Lab, *words: str) -> str:
    """Run the program on the provider's machine, on a terminal; return what it writes to stdout."""
    master, slave = os.openpty()
    program = [sys.executable, "-m", "port_checker", "check", *words]
    lab.popen(
        "provider",
        *("sh", "-c", 'exec "$@" 2>/dev/null', "sh", *program),
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
        output=slave,
    )
    os.close(slave)
    written = b""
    with open(master, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        while data := terminal.read(65536):  # fails when the program has ended
            written += data
    return written.decode().replace("\r\n", "\n")


def test_the_pictures_of_the_terminal(lab: Lab, tmp_path: Path) -> None:
    """README's pictures are made here: ``make pictures`` keeps them."""
    for ports in range(7466, 7467), range(50800, 50840), range(50850, 50900):
        lab.forward(ports)
    # They are among those that outgoing connections get by chance: those of earlier tests, say.
    default = {7466, *range(50800, 50900)}
    wait_until(lambda: not lab.submit("provider", tcp_sockets, default).result(), "free ports")
    output = output_on_a_terminal(lab, "--server", url_of(network.CHECKER))
    folder = Path(os.environ.get("PICTURES", tmp_path))
    for scheme in THEMES:
        picture = picture_of(output, scheme)
        (folder / f"check-{scheme}.svg").write_text(picture)
        assert "91 of 101 ports of 60.0.2.2 are reachable over IPv4." in words_of(picture)
        assert THEMES[scheme][2] in picture
        kept = ROOT / "docs" / f"check-{scheme}.svg"
        assert words_of(kept.read_text()) == words_of(picture), "make pictures takes it anew"
        assert kept.stat().st_size < 100_000


def picture_of(output: str, scheme: str) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, file=nowhere, width=100)
        console.print("$ port-checker check --server https://checker.example", highlight=False)
        console.print(Text.from_ansi(output))
        background, text, red, green = (parse_rgb_hex(it[1:]) for it in THEMES[scheme])
        colours: list[tuple[int, int, int]] = [background, red, green, *[text] * 5]
        theme = TerminalTheme(background, text, colours)
        picture = console.export_svg(
            title="port-checker check", theme=theme, unique_id=f"check-{scheme}"
        )
    # Its fonts would be loaded from elsewhere.
    return re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)


def words_of(picture: str) -> str:
    """The text on a picture."""
    lines = re.findall(r"<text[^>]*>(.*?)</text>", picture)
    return " ".join(html.unescape(" ".join(lines)).split())
