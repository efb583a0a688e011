"README as a new user meets it: every command and every piece of Python in it runs as printed, with one epoch in place of sixty; every relative link resolves."
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from PIL import Image

from acl_nb import doctor, plugins, recipes

ROOT, BIN = Path(__file__).parents[1], Path(sys.executable).parent
README = (ROOT/"README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [shlex.split(line, comments=True) for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]

MINE = '''from torch import nn
from acl_nb.losses import register_loss

class Mine(nn.Module):
    def forward(self, z, labels, centers=None): return (1 - (z[:, 0] * z[:, 1]).sum(-1)).mean()

register_loss("mine", Mine)
'''

@pytest.fixture(scope="module")
def new_user(tmp_path_factory):
    "A folder with nothing but a loss of one's own, recipes of one epoch, and a machine that is examined at once."
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("user"))
        for settings in recipes.RECIPES.values(): patch.setitem(settings, "epochs", 1)
        patch.setattr(doctor, "CHECKS", {"disk": doctor.CHECKS["disk"]})
        patch.setattr(doctor, "step_rate", lambda r, data: 100.)
        Path("mine.py").write_text(MINE)
        yield patch
    if "mine" in plugins.PLUGINS: plugins._forget(plugins.PLUGINS.pop("mine"))

def script(patch, argv):
    "The installed command, in this process: a fresh one needs seconds to import torch."
    patch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end: runpy.run_path(str(BIN/argv[0]), run_name="__main__")
    assert not end.value.code, argv

def target(name):
    "The commands of a target of the Makefile."
    return re.search(rf"^{name}:.*\n((?:\t.*\n)+)", (ROOT/"Makefile").read_text(), re.M)[1]

def run(patch, argv):
    command, *args = argv
    if argv == ["make", "demo"]:
        assert target("demo").split() == ["@$(BIN)/acl_train"]
        script(patch, ["acl_train"])
        assert Path("runs/digits_lt/report.html").is_file()
    elif command == "make": target(args[0])
    elif command == "torchrun":
        from torch.distributed.run import parse_args
        parsed = parse_args(args)
        assert parsed.no_python and parsed.training_script == "acl_train"
        script(patch, ["acl_train", *parsed.training_script_args, "--print"])
    elif command == ".": assert args == [".venv/bin/activate"]
    elif command == "acl_study":                                      # works in the project's folder; nothing is trained
        assert args == ["--status"]
        with patch.context() as here: here.chdir(ROOT); script(here, argv)
    else: script(patch, argv)

def test_every_command_runs_in_the_order_printed(new_user, capsys):
    assert len(COMMANDS) >= 9
    Image.new("RGB", (60, 40), "orange").save("photo.png")
    for argv in filter(None, COMMANDS): run(new_user, argv)
    said = capsys.readouterr().out
    assert "summary.json: the same numbers, exactly" in said and '"dataset": "cifar100_lt"' in said
    assert "balance" in json.loads(Path("runs/digits_lt-loss=scl/history.jsonl").read_text())

def test_the_python_runs(new_user):
    space = {}
    for text in PYTHON: exec(text, space)
    assert space["run"].summary["epochs"] == 1 and torch.isfinite(space["z"].grad).all() and len(PYTHON) >= 2

def links(text): return [unquote(l.split("#")[0]) for l in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)) if not re.match(r"\w+:|#", l)]

def test_every_relative_link_resolves():
    pages = {ROOT/name: (ROOT/name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
    for path in ROOT.glob("nbs/**/[!.]*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts: pages[path] = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown")
    broken = [f"{page.name}: {link}" for page, text in pages.items() for link in links(text) if not (page.parent/link).exists()]
    assert not broken and len(links(README)) > 40

def test_files_that_are_named_exist():
    for name in ("README.md", "CONTRIBUTING.md"):
        named = re.findall(r"`((?:nbs|tests)/[\w./-]+\.\w+)`", (ROOT/name).read_text(encoding="utf-8"))
        assert [n for n in named if not (ROOT/n).exists() and "NAME" not in n] == [] and named

def test_the_picture_is_small():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures and all((ROOT/p).stat().st_size < 200_000 for p in pictures)

def test_the_way_of_the_data_names_rooms_that_exist():
    named = re.findall(r'class="module"[^>]*>([\w.]+)<', (ROOT/"nbs/images/way.svg").read_text(encoding="utf-8"))
    notebooks = {path.stem.split("_", 1)[-1] for path in (ROOT/"nbs").glob("[0-9]*.ipynb")}
    assert len(named) == 8 and set(named) <= notebooks

def test_the_map_has_every_notebook():
    for path in (ROOT/"nbs").rglob("[!.]*.ipynb"):
        if path.name != "index.ipynb" and ".ipynb_checkpoints" not in path.parts: assert f"]({path.relative_to(ROOT)})" in README, f"{path.name} is not in the map of nbs/index.ipynb"
