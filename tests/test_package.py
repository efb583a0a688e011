"What is built from the repository, what it must keep to, and the studies' outputs from their results."
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from acl_nb.studies.tables import after_rows, axis_table, estimate, paired, provenance, results_table, select, study_rows

ROOT = Path(__file__).parents[1]

def copy_of_the_project(to):
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT/name, to)
    for name in ("acl_nb", "nbs"): shutil.copytree(ROOT/name, to/name, ignore=shutil.ignore_patterns("__pycache__", "runs", ".ipynb_checkpoints"))

def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    copy_of_the_project(tmp_path)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "dist", "."], cwd=tmp_path, check=True)
    wheel, = (tmp_path/"dist").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT/"acl_nb").rglob("*") if p.suffix in (".py", ".js", ".css", ".j2", ".typed", ".txt")}
    assert {n for n in names if ".dist-info/" not in n} == modules
    entry = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "acl_train=acl_nb.entry:acl_train" in entry.replace(" ", "")

def requirements(extra=""):
    "The projects that settings.ini names."
    line = re.search(rf"^{extra}requirements = (.*)$", (ROOT/"settings.ini").read_text(), re.M)[1]
    return [re.match(r"[\w.-]+", r)[0] for r in line.split()]

def test_training_needs_neither_nbdev_nor_jupyter():
    absent = ["nbdev", "execnb", "ghapi", "IPython", "ipykernel", "jupyterlab", "jupyter_client", "notebook"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import acl_nb.trainer, acl_nb.cli, acl_nb.doctor; print('there')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "there\n", done.stderr

def test_of_fastcore_only_what_its_versions_1_and_2_have_in_common():
    used = {m for p in (ROOT/"acl_nb").rglob("*.py") for m in re.findall(r"^from (fastcore[\w.]*) import (.+)$", p.read_text(), re.M)}
    assert used == {("fastcore.basics", "patch"), ("fastcore.docments", "docments")}
    assert "fastcore" in requirements() and "fastcore<2" not in re.search(r"^requirements = .*$", (ROOT/"settings.ini").read_text(), re.M)[0]

def test_the_wheels_for_a_machine_without_network_are_named_by_the_settings():
    sys.path.insert(0, str(ROOT/".ci"))
    try: import wheels
    finally: sys.path.pop(0)
    ini = {k: " ".join(requirements(extra)) for k, extra in (("requirements", ""), ("dev_requirements", "dev_"), ("bench_requirements", "bench_"))}
    package, benches = wheels.wanted(ini)
    assert set(package) == set(requirements()) - wheels.THERE | {"hypothesis"} and wheels.THERE <= set(requirements())
    assert "pytorch-metric-learning" in benches and "nbdev" not in package

def test_readme_shows_the_recorded_numbers():
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    runs = json.loads((ROOT/"nbs/studies/results/fashion_full.json").read_text())["runs"]
    for loss in {name.split("/")[0] for name in runs}:
        for key in ("top1", "many", "medium"):
            values = [r[key] for name, r in runs.items() if name.split("/")[0] == loss]
            assert f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values) / len(values)**.5:.1f}" in "".join(l for l in readme.splitlines() if l.startswith(f"| {loss} |"))
    shown = (ROOT/"nbs/images/results.svg").read_text(encoding="utf-8")
    def rows(name, **at): return select(study_rows(ROOT/f"nbs/studies/{name}.json"), **at)
    full, peers = rows("fashion_full"), rows("fashion_peers", imbalance=100)
    ten = pd.concat([full, rows("fashion_again", imbalance=100, views=2)])
    for part, a, b in ((ten, "acl", "la"), (ten, "acl", "scl"), (full, "la", "ce"), (peers, "acl", "la"), (peers, "la", "ce")):
        d = paired(part, {"arm": a}, {"arm": b})
        assert f">{100 * d.mean:+.1f}, n = {d.n}<" in shown, (a, b)

STUDIES = ROOT/"nbs/studies"
BOTH = ("top1_by_means", "few_by_means", "top1", "few", "conflict_rate")        # of what is read out by centres

def fashion_tables(rows):
    only, full = (select(rows, readout=readout) for readout in ("centers", "classifier"))
    asked = [(part, value) for part in (only, full) for value in ("top1", "few")]
    asked += [(only, value) for value in ("top1_by_means", "few_by_means")]
    probed = only.dropna(subset="conflict_rate"), "conflict_rate"
    return [axis_table(part, "views", value) for part, value in [*asked, probed]]

WAYS = ("as trained", "adjusted by 1", "adjusted, tuned", "unit weights", "weights tuned")

def after_tables(rows):
    made = after_rows(rows)
    made = made[made.afterwards.isin(WAYS)]
    return [axis_table(made, "afterwards", value) for value in ("top1", "few", "ece")]

def pretrained_tables(rows):
    "The tables of a study of frozen and fine-tuned encoders."
    ways = {"all": "frozen", "none": "fine-tuned"}
    rows = rows.assign(balanced=rows.per_class.map(statistics.mean), encoder=rows.freeze.map(ways))
    return [axis_table(rows, "encoder", value) for value in ("balanced", "top1", "few")]

TABLES = {      # what each study's notebook shows of its results
    "digits": lambda rows: [results_table(rows)], "fashion_views": fashion_tables,
    "fashion_ablation": lambda rows: [results_table(select(rows, readout=readout), values, ("aligned", "centers", "negatives")) for readout, values in (("centers", BOTH), ("classifier", ("top1", "few", "conflict_rate")))],
    "fashion_conflict": lambda rows: [results_table(rows.assign(accuracy=rows.top1_by_means.where(rows.readout == "centers", rows.top1)), ("accuracy", "conflict_rate"), ("readout", "temperature", "views", "arm"))],
    "fashion_full": lambda rows: [results_table(rows, ("top1", "many", "medium"))],
    "fashion_again": lambda rows: [axis_table(rows.assign(setting=[f"imbalance {i}, {v} views" for i, v in zip(rows.imbalance, rows.views)]), "setting")],
    "fashion_factors": lambda rows: [f"| {estimate(select(rows, arm='la', **at))} | {estimate(select(rows, arm='acl', **at))} |" for at in (dict(views=2), dict(views=4), dict(epochs=20), dict(policy="fashion_strong"), dict(scale=10), dict(scale=30))],
    "glyphs": lambda rows: [results_table(select(rows, readout="centers"), BOTH), results_table(select(rows, readout="classifier"))],
    "after_the_fact": after_tables, "pretrained": pretrained_tables,
    "fashion_peers": lambda rows: [axis_table(rows, "imbalance", value) for value in ("top1", "few")],
    "fashion_sensitivity": lambda rows: [axis_table(rows, axis, value) for axis in ("weight", "temperature", "batch_size", "negatives") for value in ("top1", "few")]}

RECORDED = {p.stem for p in STUDIES.glob("*.ipynb")} & {p.stem for p in (STUDIES/"results").glob("*.json")}

def texts(name, kind):
    "What a study's notebook says: its prose, or its stored outputs."
    cells = json.loads((STUDIES/f"{name}.ipynb").read_text())["cells"]
    if kind == "prose": return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    return ["".join(o["data"]["text/markdown"]) for c in cells if c["cell_type"] == "code" for o in c["outputs"] if "text/markdown" in o.get("data", {})]

def test_every_study_with_a_notebook_and_results_has_its_tables_compared():
    assert RECORDED == set(TABLES)

@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_study_shows_what_is_recorded(name):
    if name == "pretrained": pytest.importorskip("timm", reason="timm is not installed, whose encoder this study has")
    rows, said = study_rows(STUDIES/f"{name}.json"), "\n".join(texts(name, "outputs"))
    for expected in [*TABLES[name](rows), provenance(rows)]: assert expected in said, f"{name}.ipynb is older than its results: execute it (`make outputs`)"

def test_published_numbers_are_shown_with_their_source():
    lines = "\n".join(texts("published", "outputs")).splitlines()
    for row in csv.DictReader((STUDIES/"published.csv").open()):
        network = f"{row['network'] or '?'} | {row['pretrained'] or '–'} | {row['epochs'] or '?'}"
        assert any(f"| {row['method']} | {network} | {row['top1']} | {row['source']} |" in line for line in lines), row

RESULT = r"\d\d\.\d|± ?\d|[-+−]\d+(\.\d+)? (points|%)"         # an accuracy, an error, a difference: a cell must have computed it
def results_in(prose): return re.findall(f"({RESULT})", re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|arXiv \S+", "", prose))

def test_no_study_states_a_result_in_its_prose():
    assert results_in("75.1 %") and results_in("by ± 2") and results_in("a gain of +3 points") and not results_in("`75.1`, a 95 % interval, τ = 0.1, in 2026-11, 1.5 $75.1$")
    for path in STUDIES.glob("*.ipynb"):
        for prose in texts(path.stem, "prose"): assert not results_in(prose), f"{path.name}: {prose}"

MODULES = sorted((ROOT/"nbs").glob("[0-9]*.ipynb"))

def test_a_notebook_has_a_number_of_its_own_and_imports_from_lower_ones():
    numbers = [p.name.split("_")[0] for p in MODULES]
    assert len(set(numbers)) == len(numbers), "two notebooks share a number"
    place = {p.stem.split("_", 1)[1]: int(p.name.split("_")[0]) for p in MODULES}
    for path in MODULES:
        cells = json.loads(path.read_text())["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if re.search(r"^#\| *export", "".join(c["source"]), re.M))
        for module in re.findall(r"^from acl_nb\.([\w.]+) import", code, re.M):
            assert place[module] < int(path.name.split("_")[0]), f"{path.name} imports {module}"

def cited(text):
    "Notebooks named by their number, in words that a reader sees: a link's target and a file's path may hold it."
    seen = re.sub(r"\]\([^)]*\)|nbs/[\w.]+\.ipynb", "", text)
    return [p.stem for p in MODULES if re.search(rf"(?<![\w/]){re.escape(p.stem)}\b", seen)]

def test_prose_cites_notebooks_by_name_not_by_number():
    first = MODULES[0]
    assert cited(f"see `{first.stem}`") == [first.stem] and not cited(f"see [it](nbs/{first.name})")
    pages = {p.name: p.read_text(encoding="utf-8") for p in (ROOT/"README.md", ROOT/"CONTRIBUTING.md", ROOT/"CHANGELOG.md")}
    for path in ROOT.glob("nbs/**/*.ipynb"): pages[path.name] = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"])
    assert not {name: found for name, text in pages.items() if (found := cited(text))}

def bench_rows(name):
    "What `make bench` wrote, of the device that it was last run on."
    rows = json.loads((ROOT/"bench"/f"{name}.json").read_text(encoding="utf-8"))
    return [row for row in rows if row["device"] == rows[-1]["device"]]

def test_readme_says_what_the_benches_measured():
    ratios = [row["value"] for row in bench_rows("losses")
              if row["partner"] == "three products" and row["case"] in ("ACL batch", "ACL adjusted")]
    step = {row["case"]: row["value"] for row in bench_rows("step")
            if row["partner"] == "encoder alone" and row["section"] == "a CPU user's defaults"}
    assert len(ratios) == 8
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    sentence = next(line for line in readme.splitlines() if line.startswith("**How fast?**"))
    assert f"{min(ratios):.1f}–{max(ratios):.1f} × the three matrix products" in sentence
    assert f"{step['whole step']:.2f} × its encoder" in sentence
    assert f"the published arrangement takes {step['published']:.2f} ×" in sentence
    assert ("not run yet" in sentence) != (ROOT/"bench/gpu.json").is_file()

BENCHES = ["losses", "views", "loading", "step", "widgets", "import"]

@pytest.mark.parametrize("name", BENCHES + ["gpu"] * (ROOT/"bench/gpu.json").is_file())
def test_the_speed_study_shows_the_rows_that_are_kept(name):
    said, rows = "\n".join(texts("speed", "outputs")), bench_rows(name)
    for row in rows:
        about = f"{row['device']}, threads {row['threads']}, torch {row['torch']}, commit {row['commit']}, {row['date']}"
        line = next(line for line in said.splitlines() if line.startswith(f"- {name}: "))
        assert about in line, "speed.ipynb is older than its rows: execute it (`make outputs`)"

def test_the_speed_study_shows_the_numbers_that_are_kept():
    said = "\n".join(texts("speed", "outputs"))
    for row in bench_rows("widgets"):
        if row["figure"] == "redraw":
            line = next(line for line in said.splitlines() if line.startswith(f"| {row['case']} |"))
            assert f"| {row['value']:.0f} |" in line
    for row in bench_rows("losses"):
        if row["partner"] == "three products":
            lines = [line for line in said.splitlines() if line.startswith(f"| {row['case']} |")]
            assert any(f"| {row['value']:.2f} (" in line for line in lines), row
    for row in bench_rows("views"):
        if row["unit"] == "views/s": assert f"{row['value']:,.0f}" in said, row
    for row in bench_rows("import"):
        if row["figure"] == "CPU" and "--help" not in row["case"]: assert f"| `{row['case']}` | {row['value']:,.0f} |" in said, row

def test_every_notebook_is_executed():
    for path in ROOT.glob("nbs/**/*.ipynb"):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert any(c["outputs"] for c in cells), f"{path.name} has no outputs: run `make outputs`"
        assert "widget-view" not in json.dumps([c["outputs"] for c in cells]) and "widgets" not in json.loads(path.read_text())["metadata"], f"{path.name} stores a widget: run `make outputs`"
        assert "Warning" not in json.dumps([c["outputs"] for c in cells]), f"{path.name} stores a warning"

def test_the_repository_stays_small():
    notebooks = {p.name: p.stat().st_size for p in ROOT.glob("nbs/**/*.ipynb") if not {"runs", ".ipynb_checkpoints"} & set(p.parts)}
    assert max(notebooks.values()) < 2e6, max(notebooks, key=notebooks.get)
    kept = [p for name in ("acl_nb", "nbs", "bench", "tests", ".ci", ".github") for p in (ROOT/name).rglob("*") if p.is_file() and not {"runs", "__pycache__", ".ipynb_checkpoints"} & set(p.parts)]
    assert sum(p.stat().st_size for p in [*kept, *ROOT.glob("*.*")] if p.is_file()) < 25e6
