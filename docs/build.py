"""Builds these pages, and checks them: python docs/build.py [OUT], as a rule build/docs.

Warnings are errors. Every link within the pages must lead to a file, and to its anchor; nothing that a page needs to be
shown may come from a network.
"""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

DOCS = Path(__file__).parent


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attrs):  # noqa: D102
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "preload", "modulepreload", "icon"):
            self.loads.append(attrs.get("href"))
        if tag in ("script", "img", "iframe", "source", "video"):
            self.loads += [attrs["src"]] if attrs.get("src") else []
            self.loads += [part.split()[0] for part in (attrs.get("srcset") or "").split(",") if part.strip()]


def faults(out):
    """A line for each link that leads nowhere, and for each part that would be asked of a network."""
    pages = {path: Page(path.read_text()) for path in sorted(out.rglob("*.html")) if "_static" not in path.parts}
    for path, page in pages.items():
        for target in page.links + page.loads:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                if target in page.loads and url.scheme != "data":
                    yield f"{path.relative_to(out)} loads {target}"
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not file.is_file():
                yield f"{path.relative_to(out)} has no {target}"
            elif file in pages and unquote(url.fragment) not in pages[file].anchors:
                yield f"{path.relative_to(out)} has {target}, and that page no such place"


def main():
    """The status of the process: 0 if nothing is wrong."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else DOCS.parent / "build" / "docs").resolve()
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(out)]
    if subprocess.run(command).returncode:
        return 1
    found = list(faults(out))
    print("\n".join(found) or f"{len(list(out.rglob('*.html')))} pages in {out}, every link leads somewhere")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
