"Runs set beside each other by the command: what it prints, writes and refuses, and the page in a browser."
import json
import shutil

import pytest

from acl_nb.probes import Probe
from acl_nb.recipes import recipe
from acl_nb.records import write_json
from acl_nb.trainer import fit
from browsers import browser, needs_browser
from ranks import program

SMALL = dict(views=2, n_max=20, imbalance=4, dim=8, hidden=8, batch_size=16, epochs=2)

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder with three runs: a, one with another loss, and one with another seed."
    folder = tmp_path_factory.mktemp("runs")
    for name, more in {"a": {}, "scl": dict(loss="scl"), "seed1": dict(seed=1)}.items():
        r = recipe("digits_lt", **SMALL, **more)
        fit(r, folder/name, quiet=True, callbacks=[Probe(r, 2)])
    return folder

def compare(*arguments, cwd):
    "The command as a program."
    code = "from acl_nb.compare import acl_compare\nif __name__ == '__main__': acl_compare()\n"
    (cwd/"acl_compare").write_text(code)
    return program(cwd/"acl_compare", *arguments, cwd=cwd)

def test_a_comparison_on_the_terminal_and_on_a_page(runs):
    r = compare("a", "scl", "seed1", "--out", "page.html", cwd=runs)
    assert (r.returncode, r.stderr) == (0, "")
    lines = r.stdout.splitlines()
    assert lines[1].startswith("B  scl: digits_lt with scl, seed 0, 2 epochs, 500 test images")
    heads = [line.split() for line in lines if line.startswith(" ")]
    assert heads == [["A", "B", "C"], ["A", "B", "C", "B", "−", "A", "C", "−", "A"]]
    assert ["loss", "acl", "scl", "acl"] in [line.split() for line in lines]
    assert lines[-1] == "page.html" and (runs/"page.html").is_file()

def test_a_difference_is_that_of_the_summaries(runs):
    r = compare("a", "seed1", "--json", cwd=runs)
    assert (r.returncode, r.stderr) == (0, "")
    told, = json.loads(r.stdout)["differences"]
    first, second = (json.loads((runs/name/"summary.json").read_text()) for name in ("a", "seed1"))
    difference, low, high = told["accuracies"]["top1"]
    assert difference == pytest.approx(second["top1"] - first["top1"]) and low <= difference <= high
    assert told["paired"] and "the seed alone" in json.loads(r.stdout)["notes"][0]

def test_a_run_of_an_earlier_version(runs, tmp_path):
    for name in ("a", "scl"): shutil.copytree(runs/name, tmp_path/name)
    for name in ("a", "scl"):
        summary = json.loads((tmp_path/name/"summary.json").read_text())
        del summary["intervals"]
        write_json(tmp_path/name/"summary.json", summary)
    first, again = (compare("a", "scl", "--json", cwd=folder) for folder in (runs, tmp_path))
    assert json.loads(first.stdout)["runs"] == json.loads(again.stdout)["runs"]
    (tmp_path/"scl/predictions.npz").unlink()
    told = json.loads(compare("a", "scl", "--json", cwd=tmp_path).stdout)
    assert told["notes"][0].startswith("B kept no predictions")
    assert told["differences"][0]["accuracies"]["top1"][1:] == [None, None]

@pytest.mark.parametrize("arguments, said", [
    (["a"], "at least two runs must be named; got 1"),
    (["a", "nowhere"], "a run folder must hold recipe.json; got nowhere"),
    (["a", "unfinished"], "unfinished must hold a finished run"),
    (["a", "birds"], "runs must have the same classes to be compared; got 10 in a, 10 in birds"),
    (["a", "scl", "--out", "page.pdf"], "--out must name an .html file; got page.pdf"),
], ids=["one run", "no run", "unfinished", "other classes", "no page"])
def test_what_cannot_be_compared_is_one_sentence(runs, tmp_path, arguments, said):
    for name in ("a", "scl"): shutil.copytree(runs/name, tmp_path/name)
    shutil.copytree(runs/"a", tmp_path/"unfinished")
    (tmp_path/"unfinished/summary.json").unlink()
    shutil.copytree(runs/"a", tmp_path/"birds")
    env = json.loads((tmp_path/"birds/env.json").read_text())
    env["data"]["class_names"] = list("abcdefghij")
    write_json(tmp_path/"birds/env.json", env)
    r = compare(*arguments, cwd=tmp_path)
    assert (r.returncode, r.stdout, r.stderr.count("\n")) == (2, "", 1) and f"error: {said}" in r.stderr

@needs_browser
@pytest.mark.parametrize("width", [1300, 390])
def test_the_page_fits_a_screen_and_asks_nobody(runs, width):
    compare("a", "scl", "seed1", "--out", "page.html", cwd=runs)
    with browser() as chromium:
        page, asked = chromium.new_page(viewport={"width": width, "height": 900}), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{runs/'page.html'}")
        page.locator(".main-svg").last.wait_for(timeout=60_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".js-plotly-plot").count() == 4
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
