"The tutorial in a real browser: JupyterLab and Voilà run it, the keyboard moves a slider, the numbers on the page are those of `class_balance`."
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from acl_nb.gradients import class_balance, pair_gradients
from acl_nb.widgets import made_batch

ROOT, NOTEBOOK = Path(__file__).parents[1], "gradient_balance.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LACKING = [name for name, there in (("a chromium on the PATH", CHROMIUM), ("playwright", find_spec("playwright")), ("voila", find_spec("voila")), ("jupyterlab", find_spec("jupyterlab"))) if not there]
DEMANDED = bool(os.environ.get("ACL_NB_BROWSER"))
pytestmark = pytest.mark.skipif(bool(LACKING) and not DEMANDED, reason=f"needs {', '.join(LACKING)}; `make test-browser` demands them")

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
QUIET = '{"fetchNews": "false", "checkForUpdates": false}'
SHOTS = Path(os.environ.get("ACL_NB_SHOTS", ROOT/"runs/browser"))                       # screenshots, kept for a look

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

@contextmanager
def serving(command, port, folder):
    "A server on a port of this machine, up before and stopped after."
    lab = folder/"config/lab/@jupyterlab/apputils-extension"
    lab.mkdir(parents=True)
    (lab/"notification.jupyterlab-settings").write_text(QUIET)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
           "JUPYTER_CONFIG_DIR": str(folder/"config"), "JUPYTERLAB_SETTINGS_DIR": str(folder/"config/lab"), "OMP_NUM_THREADS": "1"}
    env.pop("ACL_NB_STILL", None)
    with open(folder/"server.log", "w") as log: server = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0: break
            assert server.poll() is None, (folder/"server.log").read_text()[-3000:]
            time.sleep(.25)
        yield
    finally:
        server.terminate()
        server.wait(20)

@contextmanager
def browser(outside):
    "A page that reaches this machine only; what it asks of others is noted."
    assert not LACKING, f"needs {', '.join(LACKING)}"
    from playwright.sync_api import sync_playwright
    def guard(route):
        if re.match(r"(http|ws)://127\.0\.0\.1|data:|blob:", route.request.url): return route.continue_()
        outside.append(route.request.url)
        route.abort()
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGS)
        page = chromium.new_page(viewport={"width": 1300, "height": 1100})
        page.route("**/*", guard)
        try: yield page
        finally: chromium.close()

# The balance explorer's figure is the one that holds both a bar and eight traces and has no slider of its own.
FIGURE = "[...document.querySelectorAll('.js-plotly-plot')].find(g => g.data && g.data.length == 8 && !(g.layout.sliders || []).length)"
BARS = f"() => {{ const g = {FIGURE}; return g && [0, 1, 2, 4, 5, 6].map(k => Array.from(g.data[k].y || [])) }}"
HEAD = f"() => {{ const g = {FIGURE}; return g && g.layout.annotations[1].text }}"

def expected(views, right):
    b = made_batch(views)
    sides = pair_gradients("scl", b.z, b.labels, temperature=.1), pair_gradients(right, b.z, b.labels, b.centers, temperature=.1)
    return [sign * class_balance(pairs, 50)[key] for pairs in sides for key, sign in (("attraction", 1), ("wrong_way", -1), ("repulsion", -1))]

def shows(page, views, right):
    "Wait until the page's bars are those of `class_balance`."
    want, deadline = expected(views, right), time.time() + 60
    while time.time() < deadline:
        got = page.evaluate(BARS)
        if got and all(len(g) == 50 and torch.allclose(torch.tensor(g, dtype=torch.float32), w, rtol=1e-3, atol=1e-6) for g, w in zip(got, want)): return
        page.wait_for_timeout(250)
    raise AssertionError(f"the page never showed {views} views with {right}: {[g[:3] for g in got or []]}")

def play(page, name):
    "Three keys on the views slider and another loss on the right; the figure follows."
    box = page.locator(".widget-vbox").filter(has=page.locator("select")).first
    box.locator(".js-plotly-plot").first.wait_for(timeout=120_000)
    shows(page, 2, "acl")
    handle = box.locator(".widget-slider").filter(has_text=re.compile(r"^views")).locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(2): page.keyboard.press("ArrowRight")
    shows(page, 4, "acl")
    box.locator("select").nth(2).select_option("BCL")
    shows(page, 4, "bcl")
    assert page.evaluate(HEAD).startswith("<b>BCL</b>") and box.locator(".js-plotly-plot").count() == 1
    SHOTS.mkdir(parents=True, exist_ok=True)
    handle.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS/f"{name}.png")
    page.set_viewport_size({"width": 800, "height": 1100})
    page.wait_for_timeout(1000)
    page.screenshot(path=SHOTS/f"{name}-800.png")

def stripped(folder):
    "The tutorial without outputs, so that what is seen was made here."
    import nbformat
    notebook = nbformat.read(ROOT/"nbs/tutorials"/NOTEBOOK, 4)
    for cell in notebook.cells: cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[], execution_count=None)
    nbformat.write(notebook, folder/NOTEBOOK)

def test_jupyterlab(tmp_path):
    stripped(tmp_path)
    port, outside = free_port(), []
    lab = ["jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=",
           f"--ServerApp.root_dir={tmp_path}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with serving(lab, port, tmp_path), browser(outside) as page:
        page.goto(f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}?reset", wait_until="domcontentloaded")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=90_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        play(page, "jupyterlab")
    assert not outside

def test_voila(tmp_path):
    stripped(tmp_path)
    port = free_port()
    voila = ["voila", NOTEBOOK, "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1", "--strip_sources=True", "--show_tracebacks=True"]
    with serving(voila, port, tmp_path), browser([]) as page:
        page.goto(f"http://127.0.0.1:{port}/", wait_until="domcontentloaded", timeout=180_000)
        play(page, "voila")
