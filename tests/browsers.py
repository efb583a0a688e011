"A real browser for the tests, where one is installed."
import os
import re
import shutil
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LACKING = [what for what, there in (("a chromium on the PATH", CHROMIUM), ("playwright", find_spec("playwright"))) if not there]
needs_browser = pytest.mark.skipif(bool(LACKING) and not os.environ.get("ACL_NB_BROWSER"), reason=f"needs {' and '.join(LACKING)}; `make test-browser` demands them")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SHOTS = Path(os.environ.get("ACL_NB_SHOTS", Path(__file__).parents[1]/"runs/browser"))     # screenshots, kept for a look

@contextmanager
def browser():
    "A chromium; its pages reach this machine only."
    assert not LACKING, f"needs {' and '.join(LACKING)}"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGS)
        try: yield chromium
        finally: chromium.close()

def new_page(chromium, address):
    "A page on its way to an address, and what it asks of others."
    page, outside = chromium.new_page(viewport={"width": 1300, "height": 1100}), []
    def guard(route):
        if re.match(r"(http|ws)://127\.0\.0\.1|data:|blob:", route.request.url): return route.continue_()
        outside.append(route.request.url)
        route.abort()
    page.route("**/*", guard)
    page.goto(address, wait_until="commit", timeout=180_000)
    return page, outside
