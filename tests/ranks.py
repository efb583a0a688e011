"Processes for the tests: forked from a server that has imported the package once, so that one starts in a moment."
import multiprocessing
import os
import socket
import sys
from contextlib import contextmanager

import pytest

SERVER = multiprocessing.get_context("forkserver")
# torch._dynamo: what averages gradients over processes imports it in its first step
SERVER.set_forkserver_preload(["acl_nb.cli", "sklearn.datasets", "torch._dynamo"])
LIMIT = 300    # seconds that a test waits for a process
SLOW = pytest.mark.skipif(not os.environ.get("ACL_SLOW"), reason="slow: ACL_SLOW=1 runs it")

def some(cases, *usual):
    "The values of a dictionary as parameters; those beside the usual ones are slow."
    return [pytest.param(value, id=name, marks=[] if name in usual else SLOW) for name, value in cases.items()]

def _run(f, args, env, said):
    os.environ.update(env)
    import torch
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(said, "a", buffering=1)
    f(*args)

def port():
    "A port that is free now."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def start(f, *args, said=os.devnull, world=1):
    "Processes 0..world-1 of f(*args), one gloo group when there are several; what they print goes to the file `said`."
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    group = [SERVER.Process(target=_run, args=(f, args, {**env, "RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {}, said)) for r in range(world)]
    for p in group: p.start()
    return group

def finish(group):
    "The exit codes."
    for p in group: p.join(LIMIT)
    return [p.exitcode for p in group]

@contextmanager
def without_batch_statistics():
    "Batch normalisation sees each process's own images; group normalisation sees one image at a time."
    from unittest.mock import patch
    from torch import nn
    group = lambda channels, **settings: nn.GroupNorm(1, channels)
    with patch.multiple(nn, BatchNorm1d=group, BatchNorm2d=group): yield
