"What is built from the repository: the wheel, and README.md from nbs/index.ipynb."
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

def copy_of_the_project(to):
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT/name, to)
    for name in ("acl_nb", "nbs", ".ci"): shutil.copytree(ROOT/name, to/name, ignore=shutil.ignore_patterns("__pycache__", "runs", ".ipynb_checkpoints"))

def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    copy_of_the_project(tmp_path)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "dist", "."], cwd=tmp_path, check=True)
    wheel, = (tmp_path/"dist").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT/"acl_nb").rglob("*.py")}
    assert {n for n in names if ".dist-info/" not in n} == modules
    entry = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "acl_train=acl_nb.cli:acl_train" in entry.replace(" ", "")

def test_readme_is_made_from_the_index_notebook(tmp_path):
    copy_of_the_project(tmp_path)
    path = f"{tmp_path/'.ci/bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["nbdev_readme"], cwd=tmp_path, check=True, env={**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert (tmp_path/"README.md").read_text() == (ROOT/"README.md").read_text(), "run `make readme`"
