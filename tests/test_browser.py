"The tutorial in a real browser: JupyterLab and Voilà run it, keys and the mouse move its controls, the numbers on the page are those of `class_balance`."
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from acl_nb.gradients import class_balance, pair_gradients
from acl_nb.widgets import made_batch
from browsers import SHOTS, browser, needs_browser, new_page

pytestmark = needs_browser
ROOT, NOTEBOOK = Path(__file__).parents[1], "gradient_balance.ipynb"
QUIET = '{"fetchNews": "false", "checkForUpdates": false}'

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

@contextmanager
def serving(folder):
    "The address of a JupyterLab on this machine, which serves Voilà too; up before and stopped after."
    lab, port = folder/"config/lab/@jupyterlab/apputils-extension", free_port()
    lab.mkdir(parents=True)
    (lab/"notification.jupyterlab-settings").write_text(QUIET)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
           "JUPYTER_CONFIG_DIR": str(folder/"config"), "JUPYTERLAB_SETTINGS_DIR": str(folder/"config/lab"), "OMP_NUM_THREADS": "1"}
    env.pop("ACL_NB_STILL", None)
    command = ["jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={folder}",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--ServerApp.jpserver_extensions={'voila.server_extension': True}", "--VoilaConfiguration.show_tracebacks=True"]
    with open(folder/"server.log", "w") as log: server = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0: break
            assert server.poll() is None, (folder/"server.log").read_text()[-3000:]
            time.sleep(.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)

def stripped(folder):
    "The tutorial without outputs, so that what is seen was made here."
    import nbformat
    notebook = nbformat.read(ROOT/"nbs/tutorials"/NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code": cell.update(outputs=[], execution_count=None)
    nbformat.write(notebook, folder/NOTEBOOK)

@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "The tutorial in JupyterLab, running, and under Voilà, which runs it by itself: both at once, to wait once."
    folder = tmp_path_factory.mktemp("browser")
    stripped(folder)
    with serving(folder) as address, browser() as chromium:
        lab, outside = new_page(chromium, f"{address}/lab/tree/{NOTEBOOK}?reset")
        lab.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        lab.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=90_000)
        lab.get_by_role("menuitem", name="Run", exact=True).click()
        lab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        voila, _ = new_page(chromium, f"{address}/voila/render/{NOTEBOOK}")
        yield lab, voila, outside

# The balance explorer's figure is the one that holds both a bar and eight traces and has no slider of its own.
FIGURE = "[...document.querySelectorAll('.js-plotly-plot')].find(g => g.data && g.data.length == 8 && !(g.layout.sliders || []).length)"
BARS = f"() => {{ const g = {FIGURE}; return g && [0, 1, 2, 4, 5, 6].map(k => Array.from(g.data[k].y || [])) }}"
HEAD = f"() => {{ const g = {FIGURE}; return g && g.layout.annotations[1].text }}"
FILLS = f"() => {{ const g = {FIGURE}; return Math.abs(g._fullLayout.width - g.parentElement.clientWidth) < 20 }}"
FOCUSED = "() => { const e = document.activeElement.closest('.widget-inline-hbox, .widget-checkbox'); return e && e.innerText.split('\\n')[0] }"

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

def press(slider, key, reads):
    "A key on a slider, until it reads so."
    handle = slider.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    handle.press(key)
    slider.locator(".widget-readout").get_by_text(reads, exact=True).wait_for(timeout=20_000)

def play(page, name):
    "Keys on the views slider and another loss on the right; the figure follows, and fills its place at any width."
    box = page.locator(".widget-vbox").filter(has=page.locator("select")).first
    box.locator(".js-plotly-plot").first.wait_for(timeout=120_000)
    shows(page, 2, "acl")
    page.wait_for_function(FILLS, timeout=20_000)
    views = box.locator(".widget-slider").filter(has_text=re.compile(r"^views"))
    press(views, "ArrowRight", "3")
    press(views, "ArrowRight", "4")
    shows(page, 4, "acl")
    box.locator("select").nth(2).select_option("BCL")
    shows(page, 4, "bcl")
    assert page.evaluate(HEAD).startswith("<b>BCL</b>") and box.locator(".js-plotly-plot").count() == 1
    SHOTS.mkdir(parents=True, exist_ok=True)
    for width in (1300, 800):
        page.set_viewport_size({"width": width, "height": 1100})
        page.wait_for_function(FILLS, timeout=20_000)
        page.screenshot(path=SHOTS/f"{name}-{width}.png")

def tabbed(page):
    "Names of the controls that the Tab key reaches, from the first on."
    page.locator(".widget-vbox select").first.focus()
    names = []
    while (name := page.evaluate(FOCUSED)) and len(names) < 40:
        names.append(name)
        page.keyboard.press("Tab")
    return names

def drag(page, path, x, y):
    "Drag a shape by some pixels."
    path.scroll_into_view_if_needed()
    box = path.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + x, box["y"] + box["height"] / 2 + y, steps=8)
    page.mouse.up()

def test_jupyterlab(pages):
    page, _, outside = pages
    play(page, "jupyterlab")
    names = tabbed(page)
    assert list(dict.fromkeys(names)) == ["left loss", "right loss", "views", "batch size", "temperature", "imbalance factor", "classes", "geometry", "seed", "classes sorted by", "bars show the"]   # ACL's switches rest
    assert not outside

def test_voila(pages):
    play(pages[1], "voila")

def test_a_ring_is_dragged(pages):
    page = pages[0]
    slider = page.locator(".widget-slider").filter(has_text=re.compile(r"images at"))
    readout = slider.locator(".widget-readout")
    readout.get_by_text("60", exact=True).wait_for(timeout=90_000)
    page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=90_000)       # nothing moves any more
    explorer = page.locator(".widget-vbox").filter(has=slider)
    explorer.scroll_into_view_if_needed()
    drag(page, explorer.locator("[data-index='2'] path").first, -40, -10)
    page.screenshot(path=SHOTS/"dragged.png")
    page.wait_for_function("e => Number(e.innerText) > 60 && Number(e.innerText) < 120", arg=readout.element_handle(), timeout=20_000)
