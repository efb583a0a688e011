"Two processes (gloo, CPU): a training step that equals one process's on the union batch, and runs of every loss."
import os
import re
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10

from acl_nb import loop
from acl_nb.build import build
from acl_nb.heads import CentersFromWeights
from acl_nb.loop import Training, gradients
from acl_nb.losses import LOSSES
from acl_nb.losses.acl import acl_loss_plain
from acl_nb.probes import Probe
from acl_nb.processes import all_sum, own_share, rank, world_size
from acl_nb.recipes import recipe
from acl_nb.records import Run
from acl_nb.trainer import fit
from ranks import finish, start, without_batch_statistics

PROBED = ("scl", "dscl", "bcl", "acl", "paco", "gpaco", "proco")
BY_CENTERS = [("scl", "none"), ("bcl", "free"), ("acl", "weights")]        # without a classifier's loss
CASES = [(loss, accumulate, dtype, {}) for loss in LOSSES for accumulate in (1, 2) for dtype in (torch.float32, torch.float64)]
CASES += [(loss, 2, dtype, dict(centers=c, readout="centers")) for loss, c in BY_CENTERS for dtype in (torch.float32, torch.float64)]
CASES += [("ldam", 2, dtype, dict(drw=0.)) for dtype in (torch.float32, torch.float64)]            # its classes are weighted

class OwnLoss(torch.nn.Module):
    "A user's loss, which knows nothing of processes."
    def forward(self, z, labels, centers=None): return acl_loss_plain(z, labels, centers, 0.2)

CASES += [("own", accumulate, torch.float64, {}) for accumulate in (1, 2)]

def keys(dim, n=30):
    g = torch.Generator().manual_seed(5)
    return F.normalize(torch.randn(n, dim, generator=g), dim=-1), torch.randint(0, 10, (n,), generator=g)

def gradient(loss, accumulate, dtype, more):
    "Of all weights, after a step of the trainer; the step's loss and its terms; the queue, or ProCo's means. Noise is the same in all rows."
    usual, values = torch.get_default_dtype(), []
    torch.set_default_dtype(dtype)
    def noted(*args):
        means = gradients(*args)
        values.append(torch.stack([value.detach() for value in means.values()]))
        return means
    try:
        r = recipe("digits_lt", loss=loss, views=3, n_max=20, imbalance=4, batch_size=16, dim=8, hidden=8, precision="fp32", accumulate=accumulate, **more, **({"queue": 70} if loss in ("paco", "gpaco") else {}))
        with without_batch_statistics(): training = Training(parts := build(r))
        parts.views.dtype = dtype
        if parts.keys.queue is not None: parts.keys.queue.push(*keys(r.dim))
        parts.network.train()
        same_noise = mock.patch.object(torch, "randn_like", torch.ones_like)        # each process has draws of its own
        with mock.patch.object(loop, "gradients", noted), same_noise: training.train_step(list(islice(parts.loader, accumulate)))
        queue = [t.clone() for t in parts.keys.queue.contents()] if parts.keys.queue is not None else list(parts.keys.buffers())
        if loss == "gala": queue = [parts.objective.classifier.gathered.clone()]
        return [torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parts.bare.parameters()]), *values, *queue]
    finally: torch.set_default_dtype(usual)

def balance(loss):
    "Sums of a probe after two steps, in float64."
    torch.set_default_dtype(torch.float64)
    try:
        r = recipe("digits_lt", loss=loss, views=3, n_max=20, imbalance=4, batch_size=16, dim=8, hidden=8, precision="fp32", **({"queue": 70} if loss in ("paco", "gpaco") else {}))
        with without_batch_statistics(): training = Training(parts := build(r), [probe := Probe(r, 1)])
        parts.views.dtype = torch.float64
        parts.network.train()
        training.tell("begin")
        for batch in islice(parts.loader, 2): training.train_step([batch])
        return probe.sums
    finally: torch.set_default_dtype(torch.float32)

def some_centers():
    "Centres of seven classes, which two processes can't halve, and the gradients of what makes them."
    torch.manual_seed(0)
    make, weight = CentersFromWeights(5, 6, 4).double(), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    centers = make(weight, own_share())
    (centers * torch.arange(28.).view(7, 4)).sum().backward()
    grads = [leaf.grad for leaf in (weight, *make.parameters())]
    return [centers.detach(), *(all_sum(grad.clone()) / world_size() for grad in grads)]

def one_rank(folder):
    LOSSES["own"] = OwnLoss
    found = [gradient(*case) for case in CASES]
    assert world_size() == 2
    torch.save(found, f"{folder}/{rank()}.pt")
    torch.save([balance(loss) for loss in PROBED], f"{folder}/balance{rank()}.pt")
    torch.save(some_centers(), f"{folder}/centers{rank()}.pt")

def test_a_step_equals_one_process_on_the_union_batch(tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "own", OwnLoss)
    assert finish(start(one_rank, str(tmp_path), said=tmp_path/"said", world=2)) == [0, 0], (tmp_path/"said").read_text()
    first, second = (torch.load(tmp_path/f"{r}.pt") for r in (0, 1))
    worst = {torch.float32: 0, torch.float64: 0}
    for case, a, b in zip(CASES, first, second):
        one = gradient(*case)
        for mine, other, union in zip(a, b, one):
            assert torch.equal(mine, other), case                   # the ranks agree to the last bit
            off = (mine - union).abs().max().item() / max(1, union.abs().max().item())
            worst[case[2]] = max(worst[case[2]], off)
            assert off <= (1e-6 if case[2] == torch.float32 else 1e-12), (case, off)
    print("largest difference:", worst)
    first, second = (torch.load(tmp_path/f"balance{r}.pt") for r in (0, 1))
    assert second == [{}] * len(PROBED)                             # the first process measures for both
    for loss, found in zip(PROBED, first):
        for name, value in balance(loss).items(): torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    for found in (torch.load(tmp_path/f"centers{r}.pt") for r in (0, 1)):
        for a, b in zip(found, some_centers(), strict=True): assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max())

def cifar10(root, n=24):
    "A tiny CIFAR-10 in the layout of the archive: pickled batches of rows, red plane first."
    folder, rng = root/CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        labels = np.arange(n) % 10
        rows = (rng.integers(0, 60, (n, 3, 32, 32)) + 18 * labels[:, None, None, None]).astype(np.uint8)        # classes differ in brightness
        (folder/name).write_bytes(pickle.dumps({"data": rows.reshape(n, -1), "labels": labels.tolist()}))
    (folder/"batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))
    return root

def two_epochs(root, out):
    for loss in LOSSES:
        fit(recipe("cifar10_lt", loss=loss, data=str(root), n_max=8, imbalance=4, views=2, epochs=2, batch_size=16, dim=8, hidden=8), f"{out}/{loss}", quiet=True)
    for loss, centers in BY_CENTERS:
        run = fit(recipe("cifar10_lt", loss=loss, data=str(root), n_max=8, imbalance=4, views=2, epochs=1, batch_size=16, dim=8, hidden=8, ema=0.5, centers=centers, readout="centers"), f"{out}/by {centers}", quiet=True)
        assert 0 <= run.summary["top1_by_means"] <= 1 and (centers != "none" or run.summary["top1_by_means"] == run.summary["top1"])

@pytest.mark.parametrize("world", [1, 2])
def test_every_loss_trains_two_epochs_of_a_cifar_archive(tmp_path, world):
    assert finish(start(two_epochs, str(cifar10(tmp_path/"data")), str(tmp_path), said=tmp_path/"said", world=world)) == [0] * world, (tmp_path/"said").read_text()
    for loss in LOSSES:
        run = Run(tmp_path/loss)
        assert run.finished and run.summary["loss"] == loss and len(run.history) == 2 and run.env["setup"]["processes"] == world

def misspelt():
    from acl_nb.cli import acl_train
    acl_train("digts_lt")

def test_a_mistake_is_told_once(tmp_path):
    assert finish(start(misspelt, said=tmp_path/"said", world=2)) == [2, 2]
    assert (tmp_path/"said").read_text() == "error: unknown recipe 'digts_lt': did you mean digits_lt or glyphs_lt or emoji_lt?\n"

def test_two_processes_by_the_command(tmp_path):
    cifar10(tmp_path/"data")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(29500 + os.getpid() % 1000), "--no-python",
               str(Path(sys.executable).parent/"acl_train"), "cifar10_lt", "--data", "data", "--epochs", "2", "--views", "2", "--out", "two",
               "--set", "dim=8", "hidden=8", "n_max=8", "imbalance=4", "batch_size=16"]
    r = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count("   2/2") == len(re.findall("all classes|all images", r.stdout)) == 1      # one process speaks
    assert len((tmp_path/"two"/"history.jsonl").read_text().splitlines()) == 2
