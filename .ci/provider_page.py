"""Print golem-provider.html, the page of the service that says what docs/golem-provider.md says.

`make provider-page` writes it anew; a test says when that is due.
"""

import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt

TEXT = Path(__file__).parent.parent / "docs" / "golem-provider.md"

# Where the service has what other files of docs/ say. It has nothing of the operator's.
PLACES = {"api.md": "docs", "check.md": ".#program"}

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Golem providers&rsquo; software · Golem Port Checker</title>
<link rel="icon" href="{{{{mark.svg}}}}" type="image/svg+xml">
<link rel="stylesheet" href="{{{{page.css}}}}">
</head>
<body>
<!-- Made by make provider-page of docs/golem-provider.md. -->
<header>
  <p class="name" translate="no">
    <img src="{{{{mark.svg}}}}" alt="" width="24" height="24"> Golem Port Checker
  </p>
  <nav aria-label="Site"><a href=".">Check your ports</a></nav>
</header>
<main>
{text}</main>
</body>
</html>
"""


def heading(match: re.Match[str]) -> str:
    """Give a heading the name by which links of GitHub know it."""
    name = re.sub(r"[^\w -]", "", match[2].lower()).replace(" ", "-")
    return f'<h{match[1]} id="{name}">{match[2]}</h{match[1]}>'


def link(match: re.Match[str]) -> str:
    """Lead to what is beside the page."""
    url, text = match[1], match[2]
    if url.startswith(("#", "https:")):
        return match[0]
    place = PLACES.get(url.partition("#")[0])
    return f'<a href="{place}">{text}</a>' if place else text


markdown = MarkdownIt(options_update={"typographer": True}).enable(["table", "smartquotes"])
text = markdown.render(TEXT.read_text(encoding="utf-8"))
text = re.sub(r"<h(\d)>(.*?)</h\1>", heading, text)
text = re.sub(r'<a href="(.*?)">(.*?)</a>', link, text, flags=re.DOTALL)
text = text.replace("<pre>", '<pre translate="no">').replace("<th>", '<th scope="col">')
wide = '<div class="wide" tabindex="0" role="group" aria-label="Table">'
text = text.replace("<table>", f"{wide}<table>")
text = text.replace("</table>", "</table></div>")
sys.stdout.write(PAGE.format(text=text))
