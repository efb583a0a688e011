"The rendered site and README.md: every link, anchor and image leads somewhere; pages open without an error, their figures drawn."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from nbdev.config import get_config

from browsers import SHOTS, browser, needs_browser, new_page
from test_live import opened, play

ROOT = Path(__file__).parents[1]
CFG = get_config(path=ROOT)
CODE = f"{CFG.git_url}/blob/{CFG.branch}/"

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the site, built from a copy as `make docs` does where Quarto is not installed."
    to = tmp_path_factory.mktemp("site")
    for name in ("settings.ini", "setup.py", "README.md", "_quarto.yml"): shutil.copy(ROOT/name, to)
    for name in ("acl_nb", "nbs", ".ci"): shutil.copytree(ROOT/name, to/name, ignore=shutil.ignore_patterns("__pycache__", "runs", ".ipynb_checkpoints"))
    path = f"{to/'.ci/bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": f"{to}{os.pathsep}{to/'.ci'}", "OMP_NUM_THREADS": "1"}
    for command in (["nbdev_docs"], [sys.executable, ".ci/llms.py"], ["nbdev_readme"]):     # what the first prepares, the others take
        done = subprocess.run(command, cwd=to, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return to/"_docs"

def test_readme_is_made_from_the_index_notebook(site):
    assert (site.parent/"README.md").read_text() == (ROOT/"README.md").read_text(), "run `make readme`"

class Page(HTMLParser):
    "The anchors of a page, what it refers to, and what it loads."
    def __init__(self, text):
        super().__init__()
        self.anchors, self.refs, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if attrs.get("src") or (tag == "link" and attrs.get("href")): self.loads.append(attrs.get("src") or attrs["href"])
        if attrs.get("href") or attrs.get("src"): self.refs.append(attrs.get("href") or attrs["src"])

@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}

def lines_of(module):
    "Line numbers at which a module defines something."
    return {line for node in ast.walk(ast.parse((ROOT/module).read_text())) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) for line in (node.lineno, *[d.lineno for d in node.decorator_list])}

def test_every_notebook_is_a_page_and_in_the_sidebar(site, pages):
    notebooks = [p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and "runs" not in p.parts]
    names = {str(p.relative_to(ROOT/"nbs").with_name(re.sub(r"^\d+_", "", p.stem) + ".html")) for p in notebooks}
    assert names == {str(p.relative_to(site)) for p in pages}
    index = (site/"index.html").read_text(encoding="utf-8")
    sidebar = index[index.index('id="quarto-sidebar"'):index.index("</nav>", index.index('id="quarto-sidebar"'))]
    assert not [n for n in names if f'{n}"' not in sidebar]
    assert re.findall(r'href="[./]*(\w+/\w+\.html)', sidebar)[0] == "tutorials/quick_start.html"

def test_llms_txt_describes_every_page_in_the_sidebars_order(site, pages):
    text = (site/"llms.txt").read_text(encoding="utf-8")
    assert text.startswith(f"# {CFG.title}\n\n> {CFG.description}\n")
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): \S", text, re.M)
    assert len(listed) == text.count("\n- ")
    assert sorted(listed) == sorted(f"{path.relative_to(site).as_posix()}.md" for path in pages)
    assert listed[:2] == ["index.html.md", "tutorials/quick_start.html.md"]

def test_the_markdown_of_a_page_is_text_with_links_to_other_markdown(site, pages):
    broken = []
    for path in pages:
        text = path.with_name(f"{path.name}.md").read_text(encoding="utf-8")
        assert text.startswith("# ") and "<script" not in text and len(text) < 100_000, path.name
        prose = re.sub(r"(?ms)^```.*?^```|^ {4}.*?$|`[^`\n]*`", "", text)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            url = urlsplit(link)
            inside = not url.scheme and not link.startswith("#")
            if inside and (url.path.endswith(".html") or not (path.parent/unquote(url.path)).exists()):
                broken.append((path.name, link))
    assert not broken

def test_a_tutorial_opens_in_colab_and_installs_the_package_there(pages):
    start = f"https://colab.research.google.com/github/{CFG.user}/{CFG.repo}/blob/{CFG.branch}/"
    opened = {ref.removeprefix(start) for page in pages.values() for ref in page.refs if "colab." in ref}
    assert opened == {path.relative_to(ROOT).as_posix() for path in (ROOT/"nbs/tutorials").glob("*.ipynb")}
    for path in opened:
        cells = json.loads((ROOT/path).read_text(encoding="utf-8"))["cells"]
        first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert f"%pip install --quiet git+{CFG.git_url}" in first.splitlines()[-1], path

def test_no_link_anchor_or_image_is_broken(site, pages):
    broken = []
    for path, page in pages.items():
        for ref in page.refs:
            url = urlsplit(ref)
            if ref.startswith(CODE):
                module, line = unquote(url.path.split(f"/blob/{CFG.branch}/")[1]), url.fragment
                if not (ROOT/module).exists() or (line and int(line.lstrip("L")) not in lines_of(module)): broken.append((path.name, ref))
            if url.scheme or url.netloc: continue
            target = (path.parent/unquote(url.path)).resolve() if url.path else path
            if not target.exists() or (url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors): broken.append((path.name, ref))
    assert not broken

def test_no_page_asks_another_server(site, pages):
    assert not {(path.name, load) for path, page in pages.items() for load in page.loads if urlsplit(load).netloc}
    assert not [css.name for css in site.rglob("*.css") if re.search(r"@import\s+url\(.?https?:", css.read_text(encoding="utf-8"))]

def test_a_function_has_its_signature_its_docments_and_its_source(site):
    page = re.sub(r"<[^>]*>", "", (site/"losses.acl.html").read_text(encoding="utf-8"))
    for text in ("acl_loss", "temperature:float=0.1", "# [B] in 0..C-1", "source"): assert text in page, text
    everything = "".join(p.read_text(encoding="utf-8") for p in site.rglob("*.html"))
    assert "[`" not in re.sub(r"<[^>]*>", "", everything) and "\\(" not in re.sub(r"(?s)<(pre|code|script).*?</\1>", "", everything)        # no raw links, no raw formulas
    assert everything.count("<math") > 200

def test_every_symbol_has_a_readable_signature_and_a_source(site):
    for notebook in (site.parent/"_proc").glob("*.ipynb"):
        page, name = (site/re.sub(r"^\d+_", "", notebook.with_suffix(".html").name)).read_text(encoding="utf-8"), notebook.name
        assert page.count(">source</a>") == sum("echo: false" in (code := "".join(cell["source"])) and "show_doc(" in code for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]), name
        text = re.sub(r"<[^>]*>", "", page)
        assert "<strong>call</strong>" not in page and not re.search(r"def [A-Z]\w*\(\s+\*args", text) and "NoneType" not in text, name

@needs_browser
def test_pages_open_with_their_figures_drawn(site, pages):
    handler = partial(type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *a: None}), directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    errors, bare, home = [], [], f"http://127.0.0.1:{server.server_port}"
    drawn = "[...document.querySelectorAll('.plotly-graph-div')].filter(g => !g.querySelector('.main-svg') || !g.querySelector('.trace, .point, image, .heatmaplayer *, path.js-line, .shapelayer path'))"
    with browser() as chromium:
        page, outside = new_page(chromium, home)
        page.on("console", lambda m: errors.append((page.url, m.text)) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append((page.url, str(e))))
        for path in sorted(pages)[::1 if os.environ.get("ACL_NB_BROWSER") else 5]:      # a second each: all with `make test-browser`
            page.goto(f"{home}/{path.relative_to(site)}", wait_until="load")
            bare += [(path.name, figure) for figure in page.evaluate(f"{drawn}.map(g => g.id)")]
        page.goto(f"{home}/tutorials/gradient_balance.html", wait_until="load")
        moved = page.evaluate("async () => { const g = document.querySelector('.plotly-graph-div'), y = () => JSON.stringify(g.data[0].y), before = y(); const s = g.layout.sliders[0].steps[3]; await Plotly.update(g, ...s.args); return before != y() }")
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS/"site.png")
        page.set_viewport_size({"width": 390, "height": 800})
        wide = page.evaluate("document.documentElement.scrollWidth")
    server.shutdown()
    assert not errors and not bare and not outside and moved and wide <= 390

@needs_browser
def test_the_sites_explorer_under_a_hand(site):
    with browser() as chromium:
        page, said = opened(chromium, (site/"widgets.conflict.html").as_uri())
        play(page, page.locator(".acl-live").first)
        page.screenshot(path=SHOTS/"live-site.png")
    assert not said
