"Processes for the tests: forked from a server that has imported the package once, so that one starts in a moment."
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

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

def _as_main(script, words, cwd):
    os.chdir(cwd)
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(Path(script).parent))
    sys.stdout, sys.stderr = (open(f"{os.environ['SAID']}.{name}", "w", encoding="utf-8") for name in ("out", "err"))
    runpy.run_path(str(script), run_name="__main__")

def program(script, *words, cwd, **env):
    "A script as a program, without the seconds of its imports: exit code, output and errors."
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder)/"said"
        process = SERVER.Process(target=_run, args=(_as_main, (script, list(map(str, words)), cwd), {"SAID": str(said), **env}, os.devnull))
        process.start()
        code, = finish([process])
        out, err = (Path(f"{said}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
    return SimpleNamespace(returncode=code, stdout=out, stderr=err)

@contextmanager
def without_batch_statistics():
    "Batch normalisation sees each process's own images; group normalisation sees one image at a time."
    from unittest.mock import patch
    from torch import nn
    group = lambda channels, **settings: nn.GroupNorm(1, channels)
    with patch.multiple(nn, BatchNorm1d=group, BatchNorm2d=group): yield
