"""ImageNet-LT's path from list and JPEGs to a summary, small: 30 classes, 32 pixels, ResNet-18, three views, bf16, two processes with workers of their own.

One file of the training part is broken and skipped; the run is stopped in mid-epoch and goes on.
"""
import os
import signal
import time
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from acl_nb.checkpoints import latest
from acl_nb.records import Run
from ranks import finish, start
from test_resume import content

COUNTS = [max(1, round(12 * 0.85**c)) for c in range(30)]
SETTINGS = ["encoder=resnet18", "size=32", "batch_size=16", "dim=32", "hidden=64", "classes=30", "precision=bf16", "epochs=2"]

def train(data, out, save_every, on_error="skip"):
    from acl_nb.cli import acl_train
    from acl_nb.datasets import BENCHMARKS
    parts = {"train": (sum(COUNTS), 1, COUNTS[0]), "val": (30, 1, 1), "test": (60, 2, 2)}
    BENCHMARKS["imagenet_lt"] = replace(BENCHMARKS["imagenet_lt"], classes=30, parts=parts)
    acl_train("imagenet_lt_resnet50_90", data=str(data), out=str(out), save_every=save_every, workers=1, views="3", probe=2, set=[*SETTINGS, f"on_error={on_error}"])

def tree(root):
    "The folders and lists of ImageNet-LT; every class has its own colour."
    rng = np.random.default_rng(0)
    for part, counts in ("train", COUNTS), ("val", [1] * 30), ("test", [2] * 30):
        rows = []
        for y, n in enumerate(counts):
            folder = root/("train" if part == "train" else "val")/f"n{y:08}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                h, w = rng.integers(70, 110, 2)
                picture = rng.integers(0, 80, (3, h, w)) + rng.permutation([30 + 5 * y, 60, 170 - 5 * y])[:, None, None]
                Image.fromarray(picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(folder/f"{part}_{i}.JPEG")
                rows.append(f"{folder.relative_to(root)}/{part}_{i}.JPEG {y}\n")
        (root/f"ImageNet_LT_{part}.txt").write_text("".join(rows))
    broken = root/"train"/"n00000000"/"train_3.JPEG"
    broken.write_bytes(broken.read_bytes()[:-200])
    return root

def test_stopped_in_the_middle_and_gone_on(tmp_path):
    data, said = tree(tmp_path/"data"), tmp_path/"said"
    assert finish(start(train, data, tmp_path/"whole", 300., said=said, world=2)) == [0, 0], said.read_text()
    group = start(train, data, tmp_path/"run", 0., said=said, world=2)
    while not ((there := latest(tmp_path/"run"/"checkpoint")) and there.name.split("_")[2] != "0") and group[0].is_alive(): time.sleep(0.005)
    os.kill(group[1].pid, signal.SIGTERM)
    assert finish(group) == [143, 143], said.read_text()
    assert rows(tmp_path/"run") < 2 and not (tmp_path/"run"/"summary.json").exists()
    assert finish(start(train, data, tmp_path/"run", 300., said=said, world=2)) == [0, 0], said.read_text()
    assert content(tmp_path/"run") == content(tmp_path/"whole")
    run = Run(tmp_path/"run")
    assert run.summary["epochs"] == 2 and len(run.summary["per_class"]) == 30 and run.recipe["name"] == "imagenet_lt_resnet50_90"
    assert (run.env["data"]["counts"], run.env["data"]["split"], run.env["setup"]) == (COUNTS, "test", {"device": "cpu", "processes": 2, "precision": "bf16", "test_precision": "bf16"})

def rows(folder): return len((folder/"history.jsonl").read_text().splitlines()) if (folder/"history.jsonl").exists() else 0

def test_a_broken_file_is_named(tmp_path):
    data = tree(tmp_path/"data")
    assert finish(start(train, data, tmp_path/"run", 300., "raise", said=tmp_path/"said")) == [2]
    error, = [line for line in (tmp_path/"said").read_text().splitlines() if line.startswith("error: ")]
    assert "train/n00000000/train_3.JPEG must be a readable image: " in error and "truncated" in error and "Traceback" not in error
