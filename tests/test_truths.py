"Small truths that once were not: each test was red before its fault was mended."
import errno
import io
import json
import os
import re
import runpy
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from acl_nb import doctor
from acl_nb.checks import BadInput, usable_cpus
from acl_nb.cli import acl_train
from acl_nb.commands import argument_parser, command
from acl_nb.doctor import acl_doctor
from acl_nb.evaluation import acl_eval
from acl_nb.inventory import acl_data
from acl_nb.losses import LOSSES, loss_traits, make_loss
from acl_nb.recipes import recipe, recipe_from
from acl_nb.studies.run import acl_study
from acl_nb.judging import Diverged
from acl_nb.loop import Training
from acl_nb.probes import Probe
from acl_nb.trainer import fit
from acl_nb.views import POLICIES, Draws, ViewPipeline
from acl_nb.views.crops import crop_batch, crop_boxes, random_blur
from pictures import RECIPE, folder
from ranks import finish, start

# --- TF32

BACKENDS = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
COARSE = {
    "current, of CUDA": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "current, of oneDNN": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "current, of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "legacy, of CUDA": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "legacy, high": lambda: torch.set_float32_matmul_precision("high"),
    "legacy, medium": lambda: torch.set_float32_matmul_precision("medium"),
}

def precisions():
    "Everything that can be read of how float32 is multiplied; what torch refuses to say is None."
    found = [backend.fp32_precision for backend in BACKENDS]
    of_cuda = lambda: torch.backends.cuda.matmul.allow_tf32
    for legacy in (torch.get_float32_matmul_precision, of_cuda):
        try:
            found.append(legacy())
        except RuntimeError:
            found.append(None)
    return found

@pytest.fixture
def usual_precision():
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in BACKENDS:
        backend.fp32_precision = "none"

def cropped_and_blurred():
    ids = torch.arange(20)
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 40, 40), dtype=torch.uint8, generator=g)
    crops = crop_batch(images, crop_boxes(Draws(ids), 40, 40), 32)
    return random_blur(crops, Draws(ids, seed=1), p=1.0)

@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("switch_on", COARSE.values(), ids=COARSE)
def test_tf32_changes_no_view_and_stays_as_the_user_set_it(usual_precision, monkeypatch, switch_on):
    exact = cropped_and_blurred()
    switch_on()
    before, within = precisions(), []
    def watching(product):
        def watched(*args, **more):
            within.append(precisions()[1:3])
            return product(*args, **more)
        return watched

    for name in ("baddbmm", "bmm", "matmul"): monkeypatch.setattr(torch, name, watching(getattr(torch, name)))
    assert torch.equal(cropped_and_blurred(), exact)
    assert precisions() == before
    assert len(within) > 0 and all(set(found) <= {"ieee", "none"} for found in within)

def test_a_precision_that_was_inherited_is_inherited_still(usual_precision):
    torch.backends.fp32_precision = "tf32"
    cropped_and_blurred()
    torch.backends.fp32_precision = "none"
    assert precisions()[:3] == ["none"] * 3

# --- a device without float64, such as Apple's GPUs

APPLE = torch.device("mps")
# what may get tensors of the CPU as well
MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_")

class AppleTensor(torch.Tensor):
    "Says that it is on an Apple GPU and computes on the CPU; inside torch it is on `meta`."
    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        form = dict(strides=inner.stride(), storage_offset=inner.storage_offset())
        form |= dict(dtype=inner.dtype, device="meta")
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **form)

    def __init__(self, inner):
        self.inner = inner

    def __format__(self, form):
        return format(self.item(), form)

    def tolist(self):
        return self.inner.tolist()

    device = property(lambda self: APPLE)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_apple(func, args, kwargs or {})

def _is_apple(value):
    if isinstance(value, torch.device):
        return value.type in ("mps", "meta")
    return isinstance(value, AppleTensor)

def _inside(value):
    "What the CPU computes with instead."
    if isinstance(value, AppleTensor):
        return value.inner
    return torch.device("cpu") if _is_apple(value) else value

def on_apple(func, args, kwargs):
    values = []
    tree_map(values.append, (args, kwargs))
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    elsewhere = [t for t in tensors if not isinstance(t, AppleTensor) and t.ndim > 0]
    here = [t for t in tensors if isinstance(t, AppleTensor)]
    mixed = elsewhere and here
    if mixed and func._schema.name not in MAY_MIX:
        raise RuntimeError(f"{func}: tensors must be on one device")
    made = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    to_cpu = kwargs.get("device") == torch.device("cpu")
    if to_cpu or not any(map(_is_apple, values)):
        return made
    written = {id(t.inner): t for t in here}        # what works in place gives back what it got

    def wrapped(t):
        return written[id(t)] if id(t) in written else AppleTensor(t)

    return tree_map_only(torch.Tensor, wrapped, made)

class _Made(TorchDispatchMode):
    "Tensors that are made for `mps` are `AppleTensor`."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_apple(func, args, kwargs or {})

def _as_meta(value):
    is_device = isinstance(value, torch.device)
    return torch.device("meta") if is_device and value == APPLE else value

class _Named(TorchFunctionMode):
    "`mps` is `meta` before torch looks for a real one; `tensor` and `as_tensor` look into tensors."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.as_tensor and isinstance(args[0], AppleTensor):
            return args[0]
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == APPLE:
            on_cpu = func(*args, **{k: v for k, v in kwargs.items() if k != "device"})
            return AppleTensor(on_cpu)
        return func(*tree_map(_as_meta, args), **tree_map(_as_meta, kwargs))

@contextmanager
def apple_gpu():
    with _Named(), _Made():
        yield

def to_apple(t):
    return AppleTensor(t.clone()) if t.dtype != torch.float64 else AppleTensor(t.float())

def test_the_played_device_refuses_float64_and_mixed_devices():
    with apple_gpu():
        x = to_apple(torch.ones(3))
        assert x.device == APPLE and (x + 1).device == APPLE and (x + 1).cpu().tolist() == [2, 2, 2]
        assert torch.arange(3, device=APPLE).device == APPLE
        assert torch.tensor([1.], device=APPLE).device == APPLE
        wide = dict(dtype=torch.float64)
        for wrong in (x.double, lambda: x.sum(0, **wide), lambda: torch.ones(2, **wide, device=APPLE)):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        with pytest.raises(RuntimeError, match="one device"):
            x * torch.ones(3)

@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_works_without_float64(name):
    g = torch.Generator().manual_seed(0)
    small = torch.randn(40, 3, 6, 6, generator=g) * 60 + 128
    images = F.interpolate(small, (32, 32), mode="bilinear").clamp(0, 255).byte()
    pipeline = ViewPipeline(name, 32, (0.,) * 3, (1.,) * 3, views=2)
    here = pipeline(images, epoch=1)
    with apple_gpu():
        there = pipeline(to_apple(images), epoch=1)
        assert there.device == APPLE
        there = there.cpu()
    if {"AutoAugment", "RandAugment"} & set(POLICIES[name].steps):
        assert (here != there).float().mean() < 0.003          # their colours are blended in float32 there
    else:
        assert torch.equal(here, there)

def batch_of(name):
    "The loss's inputs by name, and its settings."
    g = torch.Generator().manual_seed(0)
    unit = lambda *shape: F.normalize(torch.randn(*shape, generator=g), dim=-1)
    labels = torch.arange(8) % 4
    if name == "paco":
        keys, key_labels = unit(20, 16), torch.arange(20) % 4
        given = dict(q=keys[:8].clone(), keys=keys, labels=labels, key_labels=key_labels)
        return given | dict(logits=torch.randn(8, 4, generator=g))
    if name == "gpaco":
        return dict(z=unit(8, 3, 16), labels=labels, logits=torch.randn(8, 3, 4, generator=g))
    if name == "proco":
        return dict(z=unit(8, 3, 16), labels=labels, means=0.8 * unit(4, 16))
    if loss_traits(name).kind == "contrastive":
        return dict(z=unit(8, 3, 16), labels=labels, centers=unit(4, 16))
    return dict(logits=torch.randn(8, 3, 4, generator=g), labels=labels)

def value_and_gradients(loss, batch):
    batch = {k: t.requires_grad_() if t.is_floating_point() else t for k, t in batch.items()}
    torch.manual_seed(0)                                    # for a loss that draws
    value = loss(**batch)
    value.backward()
    return [value.detach().cpu(), *(t.grad.cpu() for t in batch.values() if t.grad is not None)]

@pytest.mark.filterwarnings("ignore:at..frobenius_norm")
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_works_without_float64(name):
    settings = dict(class_counts=torch.tensor([40, 20, 10, 5]), negatives="adjusted", smooth=0.1)
    for extra in ({}, dict(weights=torch.tensor([.5, .5, 1., 2.]))) if name == "ldam" else ({},):
        loss = make_loss(name, **settings, **extra)
        here = value_and_gradients(loss, batch_of(name))
        loss = make_loss(name, **settings, **extra)             # one of them may remember batches
        with apple_gpu():
            for key, buffer in list(loss._buffers.items()):
                loss._buffers[key] = buffer if buffer is None else to_apple(buffer)
            there = value_and_gradients(loss, {k: to_apple(t) for k, t in batch_of(name).items()})
        assert len(here) == len(there) >= 2
        for a, b in zip(here, there):
            assert torch.allclose(a, b, atol=1e-6), name

# --- the command line

COMMANDS = [acl_train, acl_data, acl_eval, acl_doctor, acl_study]

def exit_of(f, capsys):
    "(exit code, stderr) of what ends the process."
    with pytest.raises(SystemExit) as exit:
        f()
    return exit.value.code, capsys.readouterr().err

@pytest.mark.parametrize("f", COMMANDS, ids=lambda f: f.__name__)
def test_an_unknown_option_is_one_sentence_with_the_nearest(f, capsys):
    parser = argument_parser(f)
    option = [name for name in parser._option_string_actions if len(name) > 4][-1]
    misspelt = option + "x"
    given = [misspelt, "3"] if f is not acl_eval else ["run", misspelt]
    said = f"error: unknown option {misspelt}: did you mean {option}?\n"
    assert exit_of(lambda: parser.parse_args(given), capsys) == (2, said)
    code, said = exit_of(lambda: parser.parse_args(["a", "b", "c"]), capsys)
    assert code == 2 and said.startswith("error: one argument too many: ") and said.count("\n") == 1

def test_vews_is_views_by_the_installed_command(monkeypatch, capsys):
    script = os.path.join(os.path.dirname(sys.executable), "acl_train")
    monkeypatch.setattr(sys, "argv", [script, "--vews", "3"])
    ended = exit_of(lambda: runpy.run_path(script, run_name="__main__"), capsys)
    assert ended == (2, "error: unknown option --vews: did you mean --views?\n")

def program(tmp_path, module, name, *args, **env):
    "A process that runs a function of a module as a script does: (arguments of Popen)."
    path = tmp_path/"program.py"
    path.write_text(f"from acl_nb.{module} import {name}\n{name}()\n")
    folders = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": folders, **env}
    form = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=env)
    return [sys.executable, path, *args], form

@pytest.mark.parametrize("module, name, word, unbuffered", [("cli", "acl_train", "--list", ""), ("inventory", "acl_data", "list", "1")])
def test_a_closed_pipe_ends_a_command_quietly(tmp_path, module, name, word, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    words, form = program(tmp_path, module, name, word, PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(words, stdout=writer, **form)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")

@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp932"])
def test_a_console_that_lacks_a_character_ends_nothing(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    @command
    def speaks():
        print("few – × 5")
        raise BadInput("`x` must be – there")

    with pytest.raises(SystemExit):
        speaks()
    acl_data("list")
    err.flush()
    assert err.buffer.getvalue() == "error: `x` must be – there\n".encode(encoding, "replace")
    assert b"few ? " in out.buffer.getvalue() and b"imagenet_lt" in out.buffer.getvalue()

@pytest.mark.parametrize("error, said", [
    (PermissionError(errno.EACCES, "Permission denied", "/data/train"), "error: /data/train: Permission denied\n"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a_file/x"), "error: a_file/x: Not a directory\n"),
])
def test_a_file_that_may_not_be_used_is_one_sentence_with_its_path(capsys, error, said):
    @command
    def fails():
        raise error

    assert exit_of(fails, capsys) == (1, said)

@pytest.mark.parametrize("rank", ["", "1", "x"])
def test_a_rank_in_the_environment_swallows_nothing(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    ended = exit_of(lambda: acl_train("digts_lt"), capsys)
    assert ended == (2, "error: unknown recipe 'digts_lt': did you mean digits_lt or glyphs_lt or emoji_lt?\n")

def one_rank_fails(shared):
    dist.init_process_group("gloo")
    dist.barrier()                          # rank 0 holds the store: if it ended first, rank 1 could not join

    @command
    def fails():
        if shared:
            error = BadInput("all know this")
            error.shared = dist.get_rank() > 0                      # rank 0 tells it
            raise error
        if dist.get_rank() == 1:
            raise BadInput("broken.jpg must be readable")

    fails()

@pytest.mark.parametrize("shared, codes, told", [
    (False, [0, 2], "rank 1: error: broken.jpg must be readable\n"),
    (True, [2, 2], "error: all know this\n"),
])
def test_an_error_of_one_rank_is_told_by_it_and_one_of_all_once(tmp_path, shared, codes, told):
    said = tmp_path/"said"
    assert finish(start(one_rank_fails, shared, said=said, world=2)) == codes
    lines = [line for line in said.read_text().splitlines(True) if "[W" not in line]
    assert "".join(lines) == told

# --- workers that import the script again

OWN_DATA = Path(__file__).parent.parent/"nbs"/"tutorials"/"own_data.ipynb"
SPAWN = "import multiprocessing\nmultiprocessing.set_start_method('spawn', force=True)\n"
FIELDS = dict(name="shapes", dataset="shapes_lt", imbalance="as_is", policy="plain",
              epochs=1, batch_size=32, dim=8, hidden=8)

CALL = 'if __name__ == "__main__":\n    acl_train()'

def own_data(tmp_path):
    "The files of the tutorial, my_project.py, mine.py, shapes.json; mine.py as a script that trains."
    cells = json.loads(OWN_DATA.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells)
    shapes = re.search(r"class Shapes:.*?\n\n(?=\w)", text, re.S)[0]
    script = re.search(r"```python\n(# mine\.py.*?)```", text, re.S)[1]
    (tmp_path/"my_project.py").write_text("import torch\n" + shapes)
    (tmp_path/"shapes.json").write_text(json.dumps(FIELDS))
    return f"{script}\nfrom acl_nb.cli import acl_train\n{CALL}\n"

def trained(tmp_path, script):
    "The process of `python mine.py` with one worker that is spawned."
    (tmp_path/"mine.py").write_text(SPAWN + script)
    folders = os.pathsep.join(p for p in sys.path if p)
    words = [sys.executable, "mine.py", "--recipe", "shapes.json", "--workers", "1"]
    form = dict(cwd=tmp_path, capture_output=True, text=True, timeout=300)
    return subprocess.run(words, **form, env={**os.environ, "PYTHONPATH": folders})

def test_the_script_of_own_data_trains_once_where_workers_import_it(tmp_path):
    done = trained(tmp_path, own_data(tmp_path))
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path/"runs") == ["shapes"] and "runs/shapes/report.html" in done.stdout

def test_a_script_without_the_condition_is_told_what_to_do_and_trains_nothing_else(tmp_path):
    script = own_data(tmp_path).replace(CALL, "acl_train()")
    done = trained(tmp_path, script)
    said = "acl_train was called by a worker process"
    told = [line for line in done.stderr.splitlines() if said in line]
    assert done.returncode != 0 and told and told[0].startswith("error: ")
    assert told[0].endswith('put the call below `if __name__ == "__main__":`')
    assert os.listdir(tmp_path/"runs") == ["shapes"]

# --- the doctor

def test_a_slow_first_step_is_not_the_rate(monkeypatch):
    waits = iter([0.5])

    def train_step(self, batches):
        time.sleep(next(waits, 0.01))

    monkeypatch.setattr(Training, "train_step", train_step)
    small = recipe("digits_lt", dim=8, hidden=8)
    data = doctor.stand_in([1, 8, 8], torch.full((10,), 10))
    assert doctor.step_rate(small, data, seconds=0.1) > 64 / 0.2

def test_the_doctor_sees_too_little_shared_memory(monkeypatch):
    photographs = recipe("imagenet_lt_resnet50_90", data="nowhere")
    check = {"shared": doctor.CHECKS["shared"]}
    for free, word in ((64e6, "slow"), (64e9, "ok")):
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
        monkeypatch.setattr("pathlib.Path.is_dir", lambda path: True)
        assert doctor.diagnose(photographs, check)["shared"].word == word
    monkeypatch.setattr("pathlib.Path.is_dir", lambda path: False)
    assert doctor.diagnose(photographs, check)["shared"].word == "missing"

@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds a process to CPUs")
def test_cpus_are_those_that_may_be_used(monkeypatch):
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert usable_cpus() == 1
        note = doctor.CHECKS["devices"](None).note
        assert torch.cuda.is_available() or "no GPU; 1 CPUs" in note
    finally:
        os.sched_setaffinity(0, mine)

# --- the engine

def test_every_file_that_is_synced_is_open_for_writing(tmp_path, monkeypatch):
    "As Windows wants it, which cannot sync folders at all."
    fcntl = pytest.importorskip("fcntl")
    from acl_nb import records
    from acl_nb.checkpoints import Checkpoint, save_checkpoint
    synced = []
    def fsync(handle):
        writes = fcntl.fcntl(handle, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR)
        if not writes: raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(handle)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(records, "os", SimpleNamespace(**{**vars(os), "name": "nt"}))
    records.write_text(tmp_path/"a.txt", "one")
    records.append_row(tmp_path/"a.jsonl", {"epoch": 1})
    save_checkpoint(tmp_path/"checkpoint", Checkpoint(1))
    assert len(synced) == 3 and len(list((tmp_path/"checkpoint").iterdir())) == 1

def test_an_average_of_the_weights_is_not_its_random_start_on_a_short_run(tmp_path):
    "120 steps with 0.999, the field's usual value: it was at chance, 6 %."
    run = fit(recipe("digits_lt", epochs=20, ema=0.999, precision="fp32"), tmp_path/"run", quiet=True)
    assert run.summary["top1"] > 0.7

@pytest.mark.parametrize("lr", ["1e6", "1e30"])
def test_an_impossible_learning_rate_diverges(tmp_path, lr):
    with pytest.raises(Diverged, match=r"training diverged in epoch 1, step \d+, at learning rate"):
        fit(recipe("digits_lt", epochs=2, lr=lr), tmp_path/"run", quiet=True)

def test_a_checkpoint_does_not_grow_with_the_history(tmp_path):
    "Nor does the history hold the forces on each class."
    r = recipe("digits_lt", epochs=12, n_max=20, imbalance=4, batch_size=16, precision="fp32")
    run = fit(r, tmp_path/"run", quiet=True, callbacks=[Probe(r, 1)])
    saved = sorted((tmp_path/"run"/"checkpoint").iterdir(), key=lambda p: int(p.name.split("_")[1]))
    assert abs(saved[-1].stat().st_size - saved[0].stat().st_size) < 200
    row = run.history[-1]["balance"]
    assert set(row["attraction"]) == {"many", "medium", "few"} and len(run.balance[-1]["balance"]["attraction"]) == 10
    lengths = [len(line) for line in (tmp_path/"run"/"history.jsonl").read_text().splitlines()]
    assert max(lengths) < 1.2 * min(lengths)

def test_too_little_shared_memory_is_a_sentence(tmp_path, monkeypatch):
    "It was a wait without end."
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64_000))
    data = folder(tmp_path/"pictures")
    mine = replace(recipe_from(RECIPE | dict(data=str(data)), "mine"), epochs=1, size=64)
    with pytest.raises(BadInput, match="`workers` must fit into shared memory"): fit(mine, tmp_path/"run", quiet=True, workers=2)
    assert fit(mine, tmp_path/"run", quiet=True).finished                    # left alone, it takes as many as fit: none

def test_a_loading_process_that_dies_ends_the_command_in_a_sentence(tmp_path, monkeypatch, capsys):
    from acl_nb.datasets import ImageArray
    usual = ImageArray.__getitems__
    def fatal(self, ids):
        if torch.utils.data.get_worker_info() is not None: os.kill(os.getpid(), 9)
        return usual(self, ids)
    monkeypatch.setattr(ImageArray, "__getitems__", fatal)
    with pytest.raises(SystemExit) as exit: acl_train("digits_lt", out=str(tmp_path/"run"), workers=1, epochs="1")
    said = capsys.readouterr().err
    assert exit.value.code == 1 and said.count("error: a process that loads images failed: DataLoader worker") == 1, said
    assert "Traceback" not in said
