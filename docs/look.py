"""Looks at the built pages in a browser, from disk and without a network, as a phone and a desktop show them.

`python docs/look.py build/docs PICTURES [WORD ...]` writes a picture of every page (whose name has one of the words) at
both widths, light and dark, and says what is wrong: a page wider than its window, a formula that was not set, an error
of a script, anything asked of a network. It needs `pip install playwright` and Chromium (Debian: `apt install
chromium`).
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WINDOWS = {"phone": (390, 844), "desktop": (1400, 900)}
# Elements that stick out of the window, and are in no box that scrolls.
TOO_WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
    [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.tagName + " " + e.textContent.trim().slice(0, 40)).slice(-2).concat("page")"""
FORMULAS = """() => [document.querySelectorAll(".math").length,
    document.querySelectorAll("mjx-container").length,
    [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(e => e.textContent)]"""


def look(browser, page, name, out):
    """A line for each thing that is wrong with a page."""
    for scheme in ("light", "dark"):
        for window, (width, height) in WINDOWS.items():
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
            )
            tab = context.new_page()
            wrong = []
            tab.on("pageerror", lambda error, wrong=wrong: wrong.append(f"script: {error}"))
            tab.on("request", lambda r, wrong=wrong: None if r.url.startswith(("file:", "data:", "blob:")) else
                   wrong.append(f"asks for {r.url}"))  # fmt: skip
            tab.goto(page.as_uri())
            tab.wait_for_load_state("load")
            if tab.evaluate("() => document.querySelectorAll('.math').length"):
                tab.evaluate("async () => { while (!window.MathJax?.startup?.promise) "
                             "await new Promise(r => setTimeout(r, 20)); await MathJax.startup.promise }")  # fmt: skip
            formulas, done, errors = tab.evaluate(FORMULAS)
            wrong += [f"{formulas} formulas, {done} set"] * (done < formulas) + errors
            wrong += [f"too wide: {e}" for e in tab.evaluate(TOO_WIDE)]
            tab.screenshot(path=out / f"{name}.{window}.{scheme}.png", full_page=True)
            context.close()
            yield from (f"{name}, {window}, {scheme}: {what}" for what in wrong)


def main():
    """The status of the process: 0 if nothing is wrong."""
    site, out = (Path(arg).resolve() for arg in sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    pages = [p for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]
    if len(sys.argv) > 3:
        pages = [p for p in pages if any(word in str(p.relative_to(site)) for word in sys.argv[3:])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        found = 0
        for page in pages:
            name = ".".join(page.relative_to(site).with_suffix("").parts)
            for line in look(browser, page, name, out):
                found += 1
                print(line)
    print(f"{len(pages)} pages, {found} faults; pictures in {out}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
