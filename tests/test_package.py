"What is built from the repository, and what it must keep to."
import json
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

def copy_of_the_project(to):
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT/name, to)
    for name in ("acl_nb", "nbs"): shutil.copytree(ROOT/name, to/name, ignore=shutil.ignore_patterns("__pycache__", "runs", ".ipynb_checkpoints"))

def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    copy_of_the_project(tmp_path)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "dist", "."], cwd=tmp_path, check=True)
    wheel, = (tmp_path/"dist").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT/"acl_nb").rglob("*.py")}
    assert {n for n in names if ".dist-info/" not in n} == modules
    entry = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "acl_train=acl_nb.cli:acl_train" in entry.replace(" ", "")

def test_readme_shows_the_recorded_numbers():
    runs = json.loads((ROOT/"nbs/studies/results/digits.json").read_text())["runs"]
    readme = (ROOT/"README.md").read_text()
    for loss in {name.split("/")[0] for name in runs}:
        for key in ("top1", "many", "medium", "few"):
            values = [100 * r[key] for name, r in runs.items() if name.split("/")[0] == loss]
            assert f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / len(values)**.5:.1f}" in next(l for l in readme.splitlines() if l.startswith(f"| {loss} |"))

def test_every_notebook_is_executed():
    for path in ROOT.glob("nbs/**/*.ipynb"):
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert any(c["outputs"] for c in cells), f"{path.name} has no outputs: run `make outputs`"
        assert "widget-view" not in json.dumps([c["outputs"] for c in cells]) and "widgets" not in json.loads(path.read_text())["metadata"], f"{path.name} stores a widget: run `make outputs`"
        assert "Warning" not in json.dumps([c["outputs"] for c in cells]), f"{path.name} stores a warning"

def test_the_repository_stays_small():
    notebooks = {p.name: p.stat().st_size for p in ROOT.glob("nbs/**/*.ipynb") if not {"runs", ".ipynb_checkpoints"} & set(p.parts)}
    assert max(notebooks.values()) < 2e6, max(notebooks, key=notebooks.get)
    kept = [p for name in ("acl_nb", "nbs", "tests", ".ci", ".github") for p in (ROOT/name).rglob("*") if p.is_file() and not {"runs", "__pycache__", ".ipynb_checkpoints"} & set(p.parts)]
    assert sum(p.stat().st_size for p in [*kept, *ROOT.glob("*.*")] if p.is_file()) < 25e6
