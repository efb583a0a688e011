"Several processes that see different files, data or recipes, or of which one has a mistake; and several runs that want one folder."
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acl_nb.checkpoints import latest
from acl_nb.records import Run
from ranks import finish, some, start
from test_resume import SMALL, train
from test_scale import tree

BIN = Path(sys.executable).parent

def fit_on_own_disk(folder, epochs, settings, report):
    "As on two machines: each process has an `out` of its own, and the second sees nothing of the first's."
    from acl_nb.recipes import recipe
    from acl_nb.trainer import fit
    rank = int(os.environ["RANK"])                                # the group does not exist yet
    class Where:
        def begin(self, run): self.at = run.epoch
        def after_epoch(self, run):
            if run.epoch == 2 and epochs == 2: raise KeyboardInterrupt
    fields = dict(setting.split("=") for setting in SMALL) | settings(rank)
    where = Where()
    try: run = fit(recipe("digits_lt", **fields), f"{folder}/{rank}", quiet=True, callbacks=[where])
    except KeyboardInterrupt: run = None
    weights = None if run is None else run.network.state_dict()
    torch.save((where.at, run is None, weights), f"{report}{rank}.pt")

def same_everywhere(rank): return {}
def other_seed(rank): return {"seed": str(rank)}

def test_processes_on_different_disks_go_on_from_the_same_state(tmp_path):
    said = tmp_path/"said"
    args = (str(tmp_path), 2, same_everywhere, str(tmp_path/"first"))
    assert finish(start(fit_on_own_disk, *args, said=said, world=2)) == [0, 0], said.read_text()
    assert latest(tmp_path/"0"/"checkpoint") and not (tmp_path/"1").exists()        # the second machine has nothing
    args = (str(tmp_path), 8, same_everywhere, str(tmp_path/"then"))
    assert finish(start(fit_on_own_disk, *args, said=said, world=2)) == [0, 0], said.read_text()
    (at, _, weights), (other_at, nothing, _) = (torch.load(tmp_path/f"then{r}.pt") for r in (0, 1))
    assert at == other_at and at >= 1 and nothing and weights is not None           # both went on in the same epoch
    assert len(Run(tmp_path/"0").history) == 8

def test_processes_with_different_recipes_are_refused(tmp_path):
    said = tmp_path/"said"
    group = start(fit_on_own_disk, str(tmp_path), 8, other_seed, str(tmp_path/"x"), said=said, world=2)
    assert 0 not in finish(group)
    assert "the recipe of a run, by its fingerprint, must be the same in all processes" in said.read_text()

def different_images():
    from acl_nb.cli import acl_train
    from acl_nb.datasets import DATASETS
    from acl_nb.processes import rank
    builder = DATASETS["digits_lt"]
    DATASETS["digits_lt"] = lambda data, imbalance, kind, seed, n_max, **more: builder(data, imbalance, kind, seed + rank(), n_max, **more)
    acl_train("digits_lt", out="run", set=SMALL)

def test_processes_with_different_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = tmp_path/"said"
    assert finish(start(different_images, said=said, world=2)) == [2, 2]
    lines = [line for line in said.read_text().splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith("error: the images of a run, by their SHA-256, must be the same"), lines

def one_broken_file(data, out):
    "The second process alone meets the broken picture, as its tenth."
    from acl_nb.cli import acl_train
    from acl_nb.datasets import BENCHMARKS
    from acl_nb.datasets.files import ImageFiles
    from acl_nb.processes import rank
    from test_scale import COUNTS, SETTINGS
    parts = {"train": (sum(COUNTS), 1, COUNTS[0]), "val": (30, 1, 1), "test": (60, 2, 2)}
    BENCHMARKS["imagenet_lt"] = replace(BENCHMARKS["imagenet_lt"], classes=30, parts=parts)
    load, asked = ImageFiles._load, []
    def unlucky(self, i):
        asked.append(i)
        broken = next(k for k in range(len(self)) if "train_3.JPEG" in str(self._name(k)))
        healthy = (broken + 1) % len(self)
        if rank() == 1 and len(asked) == 10: return load(self, broken)
        return load(self, healthy if i == broken else i)
    ImageFiles._load = unlucky
    acl_train("imagenet_lt_resnet50_90", data=data, out=out, workers=0, views="2", set=SETTINGS)

def test_a_mistake_that_one_process_alone_meets_is_told_with_its_rank_and_ends_all(tmp_path):
    data, said = tree(tmp_path/"data"), tmp_path/"said"
    began = time.time()
    group = start(one_broken_file, str(data), str(tmp_path/"run"), said=said, world=2)
    codes = finish(group)
    text = said.read_text()
    assert codes[1] == 2 and codes[0] in (1, 2) and time.time() - began < 120, (codes, text)
    assert text.count("rank 1: error: ") == 1 and "train_3.JPEG must be a readable image" in text, text
    assert "Traceback" not in text and "another process of this run has ended" in text, text

def download_once(folder):
    "A builder that downloads where nothing is there, as those of CIFAR and Fashion-MNIST do: two at once break each other."
    from acl_nb.cli import acl_train
    from acl_nb.datasets import DATASETS
    builder = DATASETS["digits_lt"]
    def downloading(data, *settings, **more):
        target = Path(folder)/"archive"
        if not target.exists():
            time.sleep(0.5)                                       # the download
            target.mkdir()                                        # FileExistsError for the second
            with open(Path(folder)/"downloads", "a") as file: file.write("x")
        return builder(None, *settings, **more)
    DATASETS["digits_lt"] = downloading
    acl_train("digits_lt", out=f"{folder}/run", epochs="1", set=[s for s in SMALL if "batch_size" not in s and "epochs" not in s] + ["batch_size=18"])

def test_data_are_fetched_by_one_process_of_a_machine(tmp_path):
    said = tmp_path/"said"
    assert finish(start(download_once, str(tmp_path), said=said, world=3)) == [0, 0, 0], said.read_text()
    assert (tmp_path/"downloads").read_text() == "x"

def no_data(folder):
    from acl_nb.cli import acl_train
    acl_train("cifar10_lt", data=f"{folder}/nothing/there", out=f"{folder}/run")

def test_data_that_nobody_has_are_told_once_and_end_all(tmp_path):
    said, began = tmp_path/"said", time.time()
    assert finish(start(no_data, str(tmp_path), said=said, world=2)) == [2, 2], said.read_text()
    assert said.read_text().count("error: ") == 1 and time.time() - began < 60, said.read_text()

LAUNCHES = {
    "RANK alone": dict(RANK="1"),
    "RANK that is empty": dict(RANK=""),
    "RANK that is no number": dict(RANK="one", WORLD_SIZE="2"),
    "srun without torchrun": dict(SLURM_NTASKS="8", SLURM_PROCID="3"),
    "WORLD_SIZE alone": dict(WORLD_SIZE="4"),
}

@pytest.mark.parametrize("variables", some(LAUNCHES, "RANK alone", "srun without torchrun"))
def test_a_launch_that_does_not_fit_together_is_one_sentence(tmp_path, variables):
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID")
    env = {k: v for k, v in os.environ.items() if k not in known} | variables
    r = subprocess.run([BIN/"acl_train"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert r.returncode == 2 and r.stderr.count("error: ") == 1 and len(r.stderr.splitlines()) == 1, r.stderr
    assert not (tmp_path/"runs").exists()

def long_run(out): train(out, ["epochs=500"])

def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(tmp_path):
    said = [tmp_path/"first", tmp_path/"second", tmp_path/"third"]
    first = start(long_run, tmp_path/"run", said=said[0])
    history = tmp_path/"run"/"history.jsonl"
    while not history.exists() and first[0].is_alive(): time.sleep(0.01)
    assert finish(start(long_run, tmp_path/"run", said=said[1])) == [2]
    text = said[1].read_text()
    assert f"is in use by process {first[0].pid} on " in text and "Traceback" not in text, text
    assert first[0].is_alive()
    os.kill(first[0].pid, signal.SIGKILL)                                   # its lock file stays, but nobody holds it
    first[0].join()
    assert json.loads((tmp_path/"run"/"lock").read_text())["pid"] == first[0].pid
    before = len(history.read_text().splitlines())
    third = start(long_run, tmp_path/"run", said=said[2])
    while len(history.read_text().splitlines()) <= before and third[0].is_alive(): time.sleep(0.01)
    os.kill(third[0].pid, signal.SIGTERM)
    assert finish(third) == [143], said[2].read_text()

def unwritable(out, code):
    "The checkpoint of the third epoch can't be written."
    import acl_nb.records
    usual = os.replace
    def replace_(old, new):
        if str(new).endswith(".pt") and "at_3_0" in str(new): raise OSError(code, os.strerror(code))
        usual(old, new)
    acl_nb.records.os.replace = replace_
    train(out, [])

@pytest.mark.parametrize("code", some({"read-only file system": 30, "quota": 122, "no right": 13}, "read-only file system"))
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, code):
    said = tmp_path/"said"
    assert finish(start(unwritable, tmp_path/"run", code, said=said)) == [1], said.read_text()
    text = said.read_text()
    line, = [line for line in text.splitlines() if "error: " in line]
    assert str(tmp_path/"run"/"checkpoint"/"at_3_0") in line and os.strerror(code) in line and "Traceback" not in text, text
    assert latest(tmp_path/"run"/"checkpoint").name.startswith("at_2_0") and not list(tmp_path.rglob("*.part"))
    assert finish(start(train, tmp_path/"run", [])) == [0]
