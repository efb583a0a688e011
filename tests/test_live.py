"The live explorers in a real browser: numbers against the package's, and the same hands on a page, on the site's page and on JupyterLab's widget."
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F

from acl_nb.gradients import class_balance, pair_gradients
from acl_nb.plots.live import live_page, live_side
from acl_nb.probes import Probe
from acl_nb.recipes import recipe
from acl_nb.trainer import fit
from browsers import SHOTS, browser, needs_browser, new_page

pytestmark = needs_browser
ROOT = Path(__file__).parents[1]
QUIET = '{"fetchNews": "false", "checkForUpdates": false}'
START = {"loss": [live_side("SCL"), live_side("ACL")], "start": "one anchor", "views": 2, "temperature": 0.3}
DARK = "<style>@media (prefers-color-scheme: dark) {body {background: #1b1b1b; color: #eee}}</style>"

def write_page(path, *explorers):
    "A page of explorers, to be opened as a file."
    body = "\n".join(live_page(kind, state) for kind, state in explorers)
    head = f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">{DARK}'
    path.write_text(f"{head}<body>{body}", encoding="utf-8")
    return path.as_uri()

def opened(chromium, address, **options):
    "A page with what its console said."
    page, said = chromium.new_context(**{"viewport": {"width": 1300, "height": 1000}} | options).new_page(), []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    page.wait_for_selector(".acl-live svg")
    return page, said

@pytest.fixture(scope="module")
def chromium():
    with browser() as found: yield found

# ---- numbers ----

def batch_of(seed):
    g = torch.Generator().manual_seed(seed)
    B, V, C, D = 2 + seed % 9, 1 + seed % 4, 2 + seed % 6, 2 + seed % 5
    draw = lambda *shape: F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)
    return draw(B, V, D), torch.randint(C, (B,), generator=g), draw(C, D), torch.randint(1, 500, (C,), generator=g)

SIDES = {"scl": {}, "bcl": {}, "paco": {}} | {
    f"acl {aligned} {centers} {negatives}": {"aligned": aligned, "centers": centers, "negatives": negatives}
    for aligned in (True, False) for centers in (True, False) for negatives in ("batch", "prior", "adjusted", "none")}

def expected(name, z, labels, centers, counts, temperature=0.2):
    loss, kw = name.split()[0], dict(SIDES[name])
    keys = {"scl": None, "bcl": centers, "paco": None}.get(loss, centers if kw.pop("centers", False) else None)
    if loss == "paco": kw |= {"logits": z @ centers.T / temperature}
    if loss in ("paco", "acl"): kw |= {"class_counts": counts}
    return pair_gradients(loss, z, labels, keys, temperature=temperature, **kw)

def test_numbers_are_those_of_pair_gradients(chromium, tmp_path):
    page, said = opened(chromium, write_page(tmp_path/"page.html", ("conflict", START)))
    for seed in range(50):
        z, labels, centers, counts = batch_of(seed)
        batch = {"z": z.flatten().tolist(), "dim": z.shape[-1], "labels": labels.repeat_interleave(z.shape[1]).tolist(),
                 "centers": centers.flatten().tolist(), "counts": counts.tolist(), "temperature": 0.2}
        sides = {name: {"loss": name.split()[0], **kw} for name, kw in SIDES.items()}
        found = page.evaluate("""([batch, sides]) => Object.fromEntries(Object.entries(sides).map(([name, side]) => {
            const found = aclLive.coefficients(batch, side), sums = aclLive.classBalance(batch, found);
            return [name, [found.coef, sums.attraction, sums.wrong_way, sums.repulsion].map((a) => Array.from(a))]; }))""", [batch, sides])
        for name, (coef, *sums) in found.items():
            pairs = expected(name, z, labels, centers, counts)
            balance = class_balance(pairs, len(centers))
            torch.testing.assert_close(torch.tensor(coef, dtype=torch.float64).view_as(pairs.coef), pairs.coef, rtol=1e-9, atol=1e-12)
            for got, part in zip(sums, ("attraction", "wrong_way", "repulsion")):
                torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), balance[part], rtol=1e-9, atol=1e-12)
    assert not said

# ---- hands: one script for a page, the site and JupyterLab ----

STATE = "(n = 0) => { const e = [...document.querySelectorAll('.acl-live')].filter((e) => e.explorer).at(n).explorer; return {...e.s, z: e.s.z.map((z) => Array.from(z)), said: e.panels.map((p) => p.said.innerText)}; }"

def angle(state, i, side=0):
    "Of a point on the circle, in degrees."
    x, y = state["z"][side][2 * i:2 * i + 2]
    return math.degrees(math.atan2(y, x))

def centre_of(locator):
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

def to_angle(page, root, degrees):
    "Where on the screen the left circle has an angle."
    box = root.locator("svg").first.bounding_box()
    radius = box["width"] / 3
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    return x + radius * math.cos(math.radians(degrees)), y - radius * math.sin(math.radians(degrees))

def settled(page):
    "Two frames later, when what a hand did is drawn."
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

def drag(page, root, i, degrees):
    point = root.locator("svg").first.locator("g.point").nth(i)
    point.scroll_into_view_if_needed()
    page.mouse.move(*centre_of(point))
    page.mouse.down()
    page.mouse.move(*to_angle(page, root, degrees), steps=6)
    page.mouse.up()
    settled(page)

def touch(page, root, i, degrees):
    "The same with a finger."
    point = root.locator("svg").first.locator("g.point").nth(i)
    point.scroll_into_view_if_needed()
    hand, (x0, y0), (x1, y1) = page.context.new_cdp_session(page), centre_of(point), to_angle(page, root, degrees)
    hand.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x0, "y": y0}]})
    for k in range(1, 7): hand.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [{"x": x0 + k * (x1 - x0) / 6, "y": y0 + k * (y1 - y0) / 6}]})
    hand.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    settled(page)

def play(page, root, finger=False):
    "Drag, keys, views, losses, step, run and reset; what is shown after each."
    conflicts = lambda side: int(page.evaluate(STATE)["said"][side].split()[0])
    assert conflicts(0) > 0 == conflicts(1)
    (touch if finger else drag)(page, root, 2, 20)
    state = page.evaluate(STATE)
    assert abs(angle(state, 2) - 20) < 4 and abs(angle(state, 2, 1) - 20) < 4           # both panels show the same points
    point = root.locator("svg").first.locator("g.point").nth(2)
    point.focus()
    before = angle(page.evaluate(STATE), 2)
    for _ in range(4): page.keyboard.press("ArrowLeft")
    state = page.evaluate(STATE)
    assert abs(angle(state, 2) - before - 12) < .1 and state["chosen"] == 2
    root.get_by_role("button", name="step", exact=True).click()
    assert page.evaluate(STATE)["steps"] == 5
    root.get_by_role("button", name="run", exact=True).click()
    page.wait_for_function(f"() => ({STATE})().steps > 60")
    root.get_by_role("button", name="pause", exact=True).click()
    state = page.evaluate(STATE)
    assert state["z"][0] != state["z"][1]                                             # each loss went its own way
    root.get_by_role("button", name="reset", exact=True).click()
    state = page.evaluate(STATE)
    assert state["steps"] == 0 and state["z"][0] == state["z"][1]
    slider = root.get_by_label(re.compile("^views")).first
    slider.focus()
    page.keyboard.press("ArrowRight")
    state = page.evaluate(STATE)
    assert state["views"] == 3 and len(state["labels"]) == 12
    loss = root.get_by_label("right loss").last
    loss.focus()
    loss.select_option("BCL")
    assert page.evaluate(STATE)["loss"][1] == {"loss": "bcl"} and conflicts(1) > 0
    assert page.evaluate("() => document.activeElement.tagName") == "SELECT"           # the keyboard stays where it was
    images = len(set(page.evaluate(STATE)["image"]))
    root.get_by_role("button", name="+ other").click()
    root.get_by_role("button", name="+ image").click()
    root.get_by_role("button", name="− image").click()
    assert len(set(page.evaluate(STATE)["image"])) == images + 1

def test_hands_on_a_page(chromium, tmp_path):
    page, said = opened(chromium, write_page(tmp_path/"page.html", ("conflict", START)))
    play(page, page.locator(".acl-live").first)
    assert not said

def test_fingers_on_a_phone(chromium, tmp_path):
    page, said = opened(chromium, write_page(tmp_path/"page.html", ("conflict", START)), viewport={"width": 390, "height": 844}, has_touch=True)
    play(page, page.locator(".acl-live").first, finger=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    assert not said

def test_a_sphere_is_turned_and_its_points_stay_on_it(chromium, tmp_path):
    page, said = opened(chromium, write_page(tmp_path/"page.html", ("conflict", START | {"dim": 3, "start": "long tail"})))
    root = page.locator(".acl-live").first
    drag(page, root, 0, 100)
    z = torch.tensor(page.evaluate(STATE)["z"][0], dtype=torch.float64).view(-1, 3)
    assert (z.norm(dim=1) - 1).abs().max() < 1e-9
    box, places = root.locator("svg").first.bounding_box(), lambda: root.locator("svg").first.locator("g.point").evaluate_all("all => all.map((p) => p.getAttribute('transform'))")
    before = places()
    page.mouse.move(box["x"] + 8, box["y"] + 8)
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 30, steps=4)
    page.mouse.up()
    settled(page)
    assert places() != before and page.evaluate(STATE)["z"][0] == z.flatten().tolist()
    assert not said

def test_a_link_shows_what_its_sender_saw(chromium, tmp_path):
    address = write_page(tmp_path/"page.html", ("conflict", START), ("balance", {}))
    page, _ = opened(chromium, address)
    root = page.locator(".acl-live").first
    drag(page, root, 0, -75)
    root.get_by_role("button", name="link").click()
    sent = page.evaluate(STATE)
    received, said = opened(chromium, page.evaluate("location.href"))
    got = received.evaluate(STATE)
    assert received.evaluate("location.href").startswith(address) and got["labels"] == sent["labels"]
    assert torch.allclose(torch.tensor(got["z"]), torch.tensor(sent["z"]), atol=1e-3) and abs(angle(got, 0) + 75) < 4
    broken, errors = opened(chromium, page.evaluate("location.href")[:-40])             # cut off in a mail
    assert broken.evaluate(STATE)["labels"] == sent["labels"] and not said + errors

def test_reset_brings_back_the_points_that_were_given(chromium, tmp_path):
    given = [1., 0., .8, .6, 0., 1., 0., -1.]
    state = START | {"dim": 2, "views": 1, "labels": [0, 0, 0, 1], "image": [0, 1, 2, 3], "z": [given, given], "temperature": .289}
    page, said = opened(chromium, write_page(tmp_path/"page.html", ("conflict", state)))
    root = page.locator(".acl-live").first
    assert "0.289" in root.inner_text()
    drag(page, root, 2, 170)
    root.get_by_role("button", name="step", exact=True).click()
    root.get_by_role("button", name="reset", exact=True).click()
    got = page.evaluate(STATE)
    assert got["steps"] == 0 and torch.allclose(torch.tensor(got["z"]), torch.tensor([given, given])) and not said

FORCES = "() => document.querySelector('.acl-live').explorer"

def test_the_balance_of_a_batch_under_hands(chromium, tmp_path):
    page, said = opened(chromium, write_page(tmp_path/"page.html", ("balance", {})))
    root = page.locator(".acl-live").first
    shown = lambda: [float(t.split()[0]) for t in page.evaluate(f"({FORCES})().panels.map((p) => p.said.innerText)")]
    two = shown()
    for _ in range(3):
        root.get_by_label(re.compile("^views")).focus()
        page.keyboard.press("ArrowRight")
    six = shown()
    assert page.evaluate(f"({FORCES})().s.views") == 6 and six[0] > two[0] > 0 == six[1] == two[1]
    chart = root.locator("svg.chart").first
    chart.focus()
    for _ in range(3): page.keyboard.press("ArrowRight")
    assert "class 3," in root.locator(".said").first.inner_text()
    chart.hover(position={"x": 5, "y": 80})
    assert "class 0," in root.locator(".said").first.inner_text()
    root.locator("summary").click()
    root.locator("table tr").nth(50).wait_for()
    assert root.locator("table tr").count() == 51                                     # classes and a head, for a screen reader
    root.get_by_label("geometry").select_option("collapsed")
    assert shown()[0] == 0
    assert not said

def test_a_film_of_two_runs(chromium, tmp_path):
    frame = lambda e: {"attraction": [e, 1.], "wrong_way": [.1, 0.], "repulsion": [.5, .5], "conflict": e / 10}
    films = [{"name": name, "counts": [120, 5], "epochs": [1, 2, 3], "frames": [frame(e) for e in (1, 2, 3)]} for name in ("one", "two")]
    page, said = opened(chromium, write_page(tmp_path/"page.html", ("balance", {"film": films})))
    root = page.locator(".acl-live").first
    assert root.locator(".said").first.inner_text().startswith("30 %")
    root.get_by_label(re.compile("^epoch")).focus()
    page.keyboard.press("ArrowLeft")
    assert root.locator(".said").first.inner_text().startswith("20 %") and root.get_by_text("two", exact=True).count()
    assert not said

@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 800, 390])
def test_looks(chromium, tmp_path, width, scheme):
    address = write_page(tmp_path/"page.html", ("conflict", START), ("balance", {}), ("conflict", START | {"dim": 3, "start": "four classes", "views": 3}))
    page, said = opened(chromium, address, viewport={"width": width, "height": 1000}, color_scheme=scheme)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS/f"live-{width}-{scheme}.png", full_page=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width and not said
    if width == 800:                                                                   # a group of controls stands on one line
        lines = page.evaluate("() => [...document.querySelectorAll('.acl-live fieldset')].map((f) => f.clientHeight)")
        assert max(lines) < 48, lines
    assert page.evaluate("() => document.querySelector('.acl-live').classList.contains('dark')") == (scheme == "dark")

# ---- JupyterLab ----

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

@contextmanager
def jupyterlab(folder):
    "The address of a JupyterLab on this machine; up before and stopped after."
    lab, port = folder/"config/lab/@jupyterlab/apputils-extension", free_port()
    lab.mkdir(parents=True)
    (lab/"notification.jupyterlab-settings").write_text(QUIET)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
           "JUPYTER_CONFIG_DIR": str(folder/"config"), "JUPYTERLAB_SETTINGS_DIR": str(folder/"config/lab"), "OMP_NUM_THREADS": "1"}
    command = ["jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=",
               f"--ServerApp.root_dir={folder}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
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

CELLS = ["from acl_nb.widgets import conflict_explorer\nexplorer = conflict_explorer()\nexplorer",
         "print('points', [[round(x, 3) for x in p] for p in explorer.points.tolist()][2], explorer.views, explorer.temperature, explorer.loss, [round(sum(side['wrong_way']), 6) > 0 for side in explorer.balance])",
         "explorer.temperature = 0.1\nexplorer.loss = 'SCL', 'ACL, adjusted'\nexplorer.views = 4",
         "explorer.points = -explorer.points",
         "explorer.show()"]

def test_jupyterlab(tmp_path, chromium):
    from playwright.sync_api import TimeoutError as Late
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path/"explorer.ipynb")
    with jupyterlab(tmp_path) as address:
        page, outside = new_page(chromium, f"{address}/lab/tree/explorer.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=90_000)
        cells = page.locator(".jp-Notebook .jp-CodeCell")
        def run_cell(k):
            cells.nth(k).locator(".cm-content").click()
            page.keyboard.press("Control+Enter")
            page.wait_for_timeout(500)
            page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=90_000)
        page.wait_for_timeout(2000)                                                      # the manager of widgets comes after the kernel
        root, drawn = page.locator(".acl-live").first, page.locator(".acl-live svg").first
        for _ in range(6):                                                               # a cell that is faster than that manager shows nothing
            run_cell(0)
            with suppress(Late): drawn.wait_for(timeout=12_000)
            if drawn.is_visible(): break
        play(page, root)
        root.get_by_role("button", name="reset", exact=True).click()
        drag(page, root, 2, -90)
        run_cell(1)
        said = cells.nth(1).locator(".jp-OutputArea").inner_text()
        x, y = map(float, re.search(r"points \[([-\d.]+), ([-\d.]+)\]", said).groups())
        assert abs(x) < .07 and abs(y + 1) < .01 and "[True, True]" in said and "'bcl'" in said       # as it was left by `play`
        run_cell(2)
        page.wait_for_function(f"() => {{ const s = ({STATE})(); return s.temperature === .1 && s.loss[1].negatives === 'adjusted'; }}")
        state = page.evaluate(STATE)
        assert len(state["labels"]) == 4 * len(set(state["image"])) and state["views"] == 4
        assert any(abs(angle(state, i) + 90) < 4 for i in range(len(state["labels"])))   # the points stayed
        before = torch.tensor(state["z"][0])
        run_cell(3)
        page.wait_for_function(f"(x) => Math.abs(({STATE})().z[0][0] + x) < 1e-6", arg=before[0].item())
        assert torch.allclose(torch.tensor(page.evaluate(STATE)["z"]), -before.expand(2, -1), atol=1e-3)                # Python has four digits
        run_cell(4)
        cells.nth(4).locator(".acl-live svg").first.wait_for(timeout=20_000)
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS/"live-jupyterlab.png")
        assert not outside

# ---- the report and the site ----

def test_a_report_has_its_film_and_grows_little(chromium, tmp_path):
    out = tmp_path/"run"
    r = recipe("digits_lt", epochs=2, n_max=40, imbalance=4)
    run = fit(r, out, quiet=True, callbacks=[Probe(r, 1)])
    html = (out/"report.html").read_text(encoding="utf-8")
    film = html[html.index('<div id="film">'):html.index("</script>", html.index("aclLive.page("))]
    assert len(film.encode()) < 60_000 and html.count("aclLive ||=") == 1
    page, said = opened(chromium, (out/"report.html").as_uri())
    root = page.locator("#film")
    counts = page.evaluate("() => document.querySelector('#film').explorer.s.film[0].counts")
    last = run.balance[-1]["balance"]
    shown = root.locator(".said").inner_text()
    assert counts == run.env["data"]["counts"] and shown.startswith(f"{round(100 * last['conflict_rate'])} %")
    root.get_by_label(re.compile("^epoch")).focus()
    page.keyboard.press("ArrowLeft")
    first = run.balance[0]["balance"]
    assert root.locator(".said").inner_text().startswith(f"{round(100 * first['conflict_rate'])} %") and not said
