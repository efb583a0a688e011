"""Runs that are killed, stopped or fail, and what comes after. A handful of kills here; ACL_SLOW=1 ACL_KILLS=20 kills as often in each setting.

Every run is a process of its own, ended by SIGKILL at random moments, among them moments of saving; it goes on until it is done.
"""
import os
import random
import signal
import time

import pytest
import torch
from torch import nn

from acl_nb.checkpoints import latest, load_checkpoint
from acl_nb.encoders import ENCODERS, CifarResNet
from acl_nb.records import Run
from pictures import folder, recipe_file
from ranks import LIMIT, finish, some, start

KILLS = int(os.environ.get("ACL_KILLS", 2))
SMALL = ["views=2", "n_max=20", "imbalance=4", "dim=8", "hidden=8", "batch_size=16", "epochs=8"]
SETTINGS = {                                                          # processes, fields, files with workers
    "bf16":                            (1, ["precision=bf16"], False),
    "fp32, paco's queue":              (1, ["precision=fp32", "loss=paco", "queue=100"], False),
    "fp32, gcl's noise":               (1, ["precision=fp32", "loss=gcl", "classifier=cosine"], False),
    "two processes, proco's means":    (2, ["loss=proco"], False),
    "fp32, gala's gradients":           (1, ["precision=fp32", "loss=gala"], False),
    "an average of the weights":       (1, ["precision=fp32", "ema=0.9"], False),
    "two processes, accumulating":     (2, ["encoder=forgetful", "accumulate=2"], False),
    "two processes, files, workers":   (2, ["epochs=8"], True),
}

class Forgetful(CifarResNet):
    "Draws from torch's generator in every step."
    def forward(self, x): return nn.functional.dropout(super().forward(x), 0.2, self.training)

def train(out, settings, save_every=300., files=None):
    from acl_nb.cli import acl_train
    ENCODERS["forgetful"] = lambda channels: Forgetful(8, channels, width=8)
    usual = [] if files else SMALL
    fields = list({s.split("=")[0]: s for s in [*usual, *settings]}.values())
    if files: acl_train(recipe=str(files), out=str(out), save_every=save_every, workers=1, set=fields)
    else: acl_train("digits_lt", out=str(out), save_every=save_every, set=fields)

def content(folder):
    "What two runs of a recipe have in common: history without timings, weights, and the trainer's state."
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in Run(folder).history]
    state = load_checkpoint(folder/"checkpoint")
    return rows, (folder/"model.safetensors").read_bytes(), flat({k: v for k, v in vars(state).items() if k not in ("grown", "seconds")})

def flat(x):
    if torch.is_tensor(x): return [x.dtype, x.flatten().tolist()]
    if isinstance(x, dict): return {k: flat(v) for k, v in x.items()}
    return [flat(v) for v in x] if isinstance(x, (list, tuple)) else x

def kill_sometime(group, folder, rng, seconds):
    "SIGKILL, at a random moment or while a checkpoint is being written; did it come in time?"
    end, saving = time.time() + rng.uniform(0.05, seconds), rng.random() < 0.3
    while time.time() < end and group[0].is_alive(): time.sleep(0.001)
    while saving and group[0].is_alive() and not any((folder/"checkpoint").glob("*.part")): pass
    caught = any((folder/"checkpoint").glob("*.part"))
    alive = group[0].is_alive()
    if alive:                                                         # else all are through, or about to be
        for p in group: p.kill()
    finish(group)
    return alive, caught

@pytest.mark.parametrize("name", some({name: name for name in SETTINGS}, "fp32, paco's queue", "two processes, files, workers"))
def test_killed_at_random_moments(tmp_path, name):
    world, settings, on_files = SETTINGS[name]
    files = recipe_file(tmp_path/"mine.json", folder(tmp_path/"pictures")) if on_files else None
    began = time.time()
    assert finish(start(train, tmp_path/"whole", settings, 300., files, said=tmp_path/"said", world=world)) == [0] * world, (tmp_path/"said").read_text()
    seconds, rng = time.time() - began, random.Random(name)
    kills = saving = between = 0
    for attempt in range(20 * KILLS):
        group = start(train, tmp_path/"killed", settings, rng.choice([0., 0.1, 300.]), files, said=tmp_path/"said", world=world)
        if kills == KILLS: break
        alive, caught = kill_sometime(group, tmp_path/"killed", rng, seconds * 0.6)
        if not alive:                                                 # it was through before the kill: begin anew
            assert [p.exitcode for p in group] == [0] * world, (tmp_path/"said").read_text()
            assert content(tmp_path/"killed") == content(tmp_path/"whole")
            for p in sorted((tmp_path/"killed").rglob("*"), reverse=True): p.rmdir() if p.is_dir() else p.unlink()
            continue
        kills += 1; saving += caught
        there = latest(tmp_path/"killed"/"checkpoint")
        between += bool(there) and there.name.split("_")[2] != "0"
    assert finish(group) == [0] * world, (tmp_path/"said").read_text()
    assert content(tmp_path/"killed") == content(tmp_path/"whole")
    assert kills == KILLS and (KILLS < 20 or saving and between)       # with many kills, some meet a save and some the middle of an epoch
    print(f"{name}: {kills} kills, {saving} of them during a save, {between} with the last checkpoint within an epoch")

def rows(folder): return len((folder/"history.jsonl").read_text().splitlines()) if (folder/"history.jsonl").exists() else 0

@pytest.mark.parametrize("world, number", [(1, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGTERM)])
def test_told_to_stop(tmp_path, world, number):
    group = start(train, tmp_path/"run", ["epochs=500"], said=tmp_path/"said", world=world)
    while rows(tmp_path/"run") < 1 and group[0].is_alive(): time.sleep(0.01)
    os.kill(group[-1].pid, number)                                    # one of them is told; all stop
    assert finish(group) == [128 + number] * world, (tmp_path/"said").read_text()
    said = (tmp_path/"said").read_text()
    assert said.count("stopped: ") == 1 and "the same command goes on from here" in said and "Traceback" not in said
    assert latest(tmp_path/"run"/"checkpoint") and not (tmp_path/"run"/"summary.json").exists()

def test_gone_on_with_fewer_processes(tmp_path):
    group = start(train, tmp_path/"run", ["epochs=12"], world=2)
    while rows(tmp_path/"run") < 1 and group[0].is_alive(): time.sleep(0.005)
    os.kill(group[0].pid, signal.SIGTERM)
    assert finish(group) == [143, 143] and finish(start(train, tmp_path/"run", ["epochs=12"], said=tmp_path/"said")) == [0]
    said = (tmp_path/"said").read_text()
    assert "'processes': 2" in said and "goes on with {'device': 'cpu', 'processes': 1" in said and rows(tmp_path/"run") == 12

def test_stopped_in_mid_epoch_and_gone_on(tmp_path):
    assert finish(start(train, tmp_path/"whole", [])) == [0]
    for attempt in range(3):
        before = latest(tmp_path/"run"/"checkpoint")
        group = start(train, tmp_path/"run", [], 0., said=tmp_path/"said")
        while latest(tmp_path/"run"/"checkpoint") == before and group[0].is_alive(): time.sleep(0.001)
        os.kill(group[0].pid, signal.SIGTERM)
        assert finish(group) == [143], (tmp_path/"said").read_text()
    assert finish(start(train, tmp_path/"run", [])) == [0]
    assert content(tmp_path/"run") == content(tmp_path/"whole")

@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_no_number(tmp_path, world):
    assert finish(start(train, tmp_path/"run", ["lr=1e30"], said=tmp_path/"said", world=world)) == [1] * world
    line, = [l for l in (tmp_path/"said").read_text().splitlines() if l.startswith("error: ")]
    assert "training diverged in epoch 1, step" in line and "at learning rate" in line and "there was no checkpoint yet" in line
    assert "Traceback" not in (tmp_path/"said").read_text()

def full_disk(out):
    "The disk fills up in the third epoch."
    save = os.fsync
    def fsync(handle):
        if rows(out) >= 3: raise OSError(28, "No space left on device")
        save(handle)
    os.fsync = fsync
    train(out, [])

def test_a_full_disk(tmp_path):
    assert finish(start(full_disk, tmp_path/"run", said=tmp_path/"said")) == [1]
    said = (tmp_path/"said").read_text()
    assert said.count("error: ") == 1 and "No space left on device: not written, what was there before is kept" in said and "Traceback" not in said
    assert latest(tmp_path/"run"/"checkpoint").name.startswith("at_2_0") and not list(tmp_path.rglob("*.part"))
    assert finish(start(train, tmp_path/"run", [])) == [0]            # there is room again

def one_dies(out, how):
    from acl_nb.processes import rank
    from acl_nb.recipes import recipe
    from acl_nb.trainer import fit
    class Death:
        def after_backward(self, run):
            if rank() == 1 and run.step == 5:
                if how == "killed": os.kill(os.getpid(), signal.SIGKILL)
                raise MemoryError("no room for this rank")
    fit(recipe("digits_lt", views=2, n_max=20, imbalance=4, dim=8, hidden=8, batch_size=16), out, quiet=True, callbacks=[Death()])

@pytest.mark.parametrize("how", ["killed", "raised"])
def test_a_rank_that_dies_ends_the_others(tmp_path, how):
    group = start(one_dies, tmp_path/"run", how, said=tmp_path/"said", world=2)
    group[1].join(LIMIT); died = time.time()
    first, second = finish(group)
    assert first not in (0, None) and second not in (0, None) and time.time() - died < 60
    said = (tmp_path/"said").read_text()
    assert ("no room for this rank" in said) == (how == "raised") and "by peer" in said                # closed or reset
