"Two processes (gloo, CPU): the gather's gradient, and a training step that equals one process's on the union batch."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from acl_nb.losses import acl_loss, scl_loss
from acl_nb.processes import all_gather, rank, world_size

LABELS = torch.tensor([0, 0, 1, 2, 0, 1, 0, 3])

def batch():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 6, generator=g, dtype=torch.float64)
    weight, centers = torch.randn(5, 6, generator=g, dtype=torch.float64), torch.randn(4, 5, generator=g, dtype=torch.float64)
    return x, weight.requires_grad_(), F.normalize(centers, dim=-1).requires_grad_()

def losses(z, labels, centers): return scl_loss(z, labels) + acl_loss(z, labels, centers)

def one_rank(r, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=r, world_size=2)
    assert (rank(), world_size()) == (r, 2)
    x, weight, centers = batch()
    mine = slice(4*r, 4*r + 4)
    z = all_gather(F.normalize(x[mine] @ weight.T, dim=-1))
    loss = losses(z, all_gather(LABELS[mine]), centers)
    loss.backward()
    for p in (weight, centers): dist.all_reduce(p.grad); p.grad /= 2        # what DistributedDataParallel does
    if r == 0: torch.save([loss.detach(), weight.grad, centers.grad], f"{folder}/two.pt")
    dist.destroy_process_group()

def test_a_step_equals_one_process_on_the_union_batch(tmp_path):
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    x, weight, centers = batch()
    loss = losses(F.normalize(x @ weight.T, dim=-1), LABELS, centers)
    loss.backward()
    for two, one in zip(torch.load(tmp_path/"two.pt"), (loss.detach(), weight.grad, centers.grad)):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize("loss", ["ce", "acl"])      # ce leaves the projection head without a gradient
def test_two_processes_train_one_run(tmp_path, loss):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(29500 + os.getpid() % 1000), "--no-python",
               str(Path(sys.executable).parent/"acl_train"), "--loss", loss, "--epochs", "3", "--views", "2", "--out", "two", "--set", "dim=8", "hidden=8"]
    r = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count("   3/3") == r.stdout.count("all classes") == 1      # one process speaks
    history = [json.loads(line) for line in open(tmp_path/"two"/"history.jsonl")]
    assert len(history) == 3 and history[-1]["loss"] < history[0]["loss"]
