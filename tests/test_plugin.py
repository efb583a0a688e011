"What a file of one's own adds, through the commands: trained, probed, stopped, gone on with and judged, by processes that know nothing of each other."
import contextlib
import io
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image

from acl_nb.records import Run
from ranks import finish, start

SOFT = '''
import os, signal
import torch
from torch import nn
from acl_nb.losses import register_loss
from acl_nb.pairs import contrast, masked_logsumexp
from acl_nb.plugins import CALLBACKS

def soft_of_pairs(c, beta):
    "The loss of the tutorial own_loss, between its ends."
    P, N = masked_logsumexp(c.sim, c.positive), masked_logsumexp(c.sim, c.negative)
    rest = torch.logaddexp(torch.tensor(beta).log() + P, N)[:, None]
    terms = torch.logaddexp(torch.tensor(1 - beta).log() + c.sim, rest) - c.sim
    n = c.positive.sum(1)
    return (torch.where(c.positive, terms, 0).sum(1) / n)[n > 0].mean()

class SoftLoss(nn.Module):
    beta = 0.5

    def __init__(self, temperature=0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, z, labels, centers=None):
        return soft_of_pairs(contrast(z, labels, self.temperature, centers), self.beta)

class Stop:
    "Ends the process after a step, where the test wants it."
    def __init__(self, recipe): self.at = int(os.environ.get("STOP_AT", 0))
    def after_step(self, run):
        if run.step == self.at: os.kill(os.getpid(), signal.SIGTERM)

register_loss("soft", SoftLoss, form=soft_of_pairs, options=("beta",), usual=dict(centers="none"))
CALLBACKS["stop"] = Stop
'''
QUICK = dict(epochs="2", views="2", set=["n_max=20", "imbalance=4", "dim=8", "hidden=8", "batch_size=16", "precision=fp32"])

def call(which, folder, env, args):
    "A command as its process runs it."
    from importlib import import_module
    os.chdir(folder)
    os.environ.update(env)
    module = {"acl_train": "cli", "acl_eval": "evaluation", "acl_predict": "predict", "acl_compare": "compare", "acl_doctor": "doctor", "acl_share": "share", "acl_data": "inventory"}[which]
    getattr(import_module(f"acl_nb.{module}"), which)(**args)

def command(which, folder, /, world=1, env={}, **args):
    "(exit codes, what was printed) of a command in processes of its own."
    said = folder/"said"
    said.write_text("")
    return finish(start(call, which, str(folder), env, args, said=said, world=world)), said.read_text()

def rows(folder): return [{k: v for k, v in row.items() if k != "seconds"} for row in Run(folder).history]

@pytest.fixture
def place(tmp_path):
    (tmp_path/"own").mkdir()
    (tmp_path/"own/soft.py").write_text(SOFT)
    return tmp_path

@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_from_a_file_trains_is_probed_resumed_and_judged(place, world):
    train = lambda out, **more: command("acl_train", place, world, name="digits_lt", loss="soft", out=out, probe=1, **QUICK, **more)
    codes, said = train("whole", plugin=["own/soft.py"])
    assert codes == [0] * world and said.count("   2/2") == 1, said
    whole = Run(place/"whole")
    noted, = whole.env["plugins"]
    assert noted["path"] == str(place/"own/soft.py") and noted["adds"] == {"loss": ["soft"], "callback": ["stop"]}
    assert whole.recipe["centers"] == "none" and whole.env["setup"]["processes"] == world
    assert all(row["balance"]["attraction"]["few"] > 0 and 0 <= row["balance"]["conflict_rate"] < 1 for row in whole.history)
    codes, said = train("stopped", plugin=["own/soft.py"], env={"STOP_AT": "6"})
    assert codes == [143] * world and not Run(place/"stopped").finished, said
    codes, said = train("stopped")                      # the folder knows the plugin
    assert codes == [0] * world and rows(place/"stopped") == rows(place/"whole"), said
    (place/"elsewhere").mkdir()
    codes, said = command("acl_eval", place/"elsewhere", run=str(place/"stopped"))
    assert codes == [0] and ("exactly" in said or world == 2), said
    codes, said = command("acl_train", place, world, recipe="stopped/recipe.json", out="again", probe=1)
    assert codes == [0] * world and rows(place/"again") == rows(place/"whole"), said

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder with a finished run of the file's loss."
    folder = tmp_path_factory.mktemp("trained")
    (folder/"soft.py").write_text(SOFT)
    codes, said = command("acl_train", folder, name="digits_lt", loss="soft", out="run", plugin=["soft.py"], **(QUICK | dict(epochs="1")))
    assert codes == [0], said
    Image.fromarray(torch.full((8, 8), 90, dtype=torch.uint8).numpy()).save(folder/"image.png")
    return folder

def test_the_commands_load_what_a_run_was_made_with(trained):
    codes, said = command("acl_predict", trained, model="run", images=["image.png"], json=True)
    assert codes == [0] and json.loads(said)[0]["nearest_center"] is None, said
    codes, said = command("acl_share", trained, run="run", out="shared")
    assert codes == [0] and str(trained) not in (trained/"shared/report.html").read_text() and "soft.py" in (trained/"shared/report.html").read_text(), said
    codes, said = command("acl_predict", trained, model="shared", images=["image.png"])         # its encoder is the package's
    assert codes == [0] and "image.png" in said, said
    codes, said = command("acl_train", trained, list=True, plugin=["soft.py"])
    assert codes == [0] and said.endswith("soft.py adds the loss soft\nsoft.py adds the callback stop\n")
    codes, said = command("acl_train", trained, fields=["temperature"], plugin=["soft.py"])
    assert codes == [0] and "soft" in said
    assert command("acl_doctor", trained, name="digits_lt", loss="sfot", plugin=["soft.py"]) == ([2], "error: unknown loss 'sfot': did you mean soft?\n")

def test_a_file_that_has_changed_or_gone_is_refused_until_it_is_named(trained):
    file = trained/"soft.py"
    try:
        file.write_text(SOFT + "\n# and more\n")
        codes, said = command("acl_eval", trained, run="run")
        assert codes == [2] and said.count("\n") == 1 and "it has changed since: put it back as it was, or name it with --plugin" in said
        codes, said = command("acl_eval", trained, run="run", plugin=["soft.py"])
        assert codes == [0] and "exactly" in said and "soft.py is taken" in said
        codes, said = command("acl_train", trained, name="digits_lt", loss="soft", out="other", plugin=["soft.py"], **(QUICK | dict(epochs="1")))
        assert codes == [0], said
        codes, said = command("acl_compare", trained, runs=["run", "other"])
        assert codes == [0] and any(line.split()[0] == "soft.py" and len(set(line.split())) == 3 for line in said.splitlines() if line.strip()), said
        (trained/"run/summary.json").rename(trained/"summary.json")         # as if it had been stopped
        codes, said = command("acl_train", trained, recipe="run/recipe.json", out="run", plugin=["soft.py"])
        assert codes == [2] and "put that back to go on, or begin anew with --resume never" in said
        (trained/"summary.json").rename(trained/"run/summary.json")
        file.unlink()
        codes, said = command("acl_eval", trained, run="run")
        assert codes == [2] and said.count("\n") == 1 and "is not there: put it back, or name a copy with --plugin" in said
    finally: file.write_text(SOFT)

def test_two_processes_with_two_files_are_refused(place):
    (place/"other.py").write_text(SOFT)
    assert finish(start(each_its_own, str(place), said=place/"said", world=2)) == [2, 2]
    assert "the plugins of a run, by their SHA-256, must be the same in all processes" in (place/"said").read_text()

def each_its_own(folder):
    from acl_nb.processes import rank
    from acl_nb.launch import start_processes
    start_processes()
    call("acl_train", folder, {}, dict(name="digits_lt", out="run", plugin=["own/soft.py"] if rank() else None, **QUICK))

SHAPES = '''
import multiprocessing
import torch
from acl_nb.datasets import DATASETS, dataset_lt

class Shapes:
    "Bright squares on a dark ground; says in which process it is asked."
    classes = ["large", "small"]
    targets = [0] * 24 + [1] * 12

    def __len__(self): return len(self.targets)

    def __getitem__(self, i):
        with open("asked", "a") as file: print(multiprocessing.current_process().name, file=file)
        side = (9, 4)[self.targets[i]]
        image = torch.randint(0, 60, (3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        image[:, 1:1 + side, 1:1 + side] += 150
        return image, self.targets[i]

def shapes_lt(data=None, imbalance="as_is", kind="exp", seed=0, n_max=None):
    return dataset_lt(Shapes(), None, imbalance, kind, seed, n_max, share=0.25, name="shapes")

DATASETS["shapes_lt"] = shapes_lt
'''

@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_data_set_of_a_file_is_loaded_by_processes_that_are_not_forked(tmp_path, method):
    (tmp_path/"shapes.py").write_text(SHAPES)
    fields = dict(name="shapes", dataset="shapes_lt", imbalance="as_is", policy="plain", epochs=1, batch_size=9, views=2, dim=8, hidden=8, encoder="resnet8_tiny")
    (tmp_path/"shapes.json").write_text(json.dumps(fields))
    code = f"""
        import multiprocessing
        multiprocessing.set_start_method({method!r})
        from acl_nb.cli import acl_train
        acl_train(recipe="shapes.json", plugin=["shapes.py"], out="run", workers=1)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert any(name.startswith("Process-") for name in (tmp_path/"asked").read_text().split())        # a worker was asked
    assert Run(tmp_path/"run").finished and Run(tmp_path/"run").env["plugins"][0]["adds"] == {"data set": ["shapes_lt"]}
