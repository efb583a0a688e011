"""What `bench_gpu.py` checks rather than times: right results, a signal to all processes, the tests."""
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from acl_nb import kernels, row_kernel
from acl_nb.checkpoints import latest
from acl_nb.datasets import DATASETS, ImageArray, LongTailed
from acl_nb.losses import LOSSES, Objective, acl, bcl, losses_that, make_loss, scl
from acl_nb.networks import Output
from acl_nb.pairs import NEGATIVES
from acl_nb.probes import Probe
from acl_nb.recipes import recipe
from acl_nb.trainer import fit
from acl_nb.views import POLICIES, ViewPipeline
from bench_losses import long_tailed_labels
from bench_views import photographs
from benching import ROOT
from test_resume import SMALL, content

# Largest error, relative to the norm of the float64 result, that float32 may make. A CPU makes 3e-7.
LOSS_TOLERANCE = 1e-4
# Of the probe, which counts signs: a coefficient that is nearly 0 may fall on either side.
PROBE_TOLERANCE = 1e-3
SHAPES = [(8, 2, 16, 5), (64, 3, 128, 100), (256, 3, 128, 1000)]    # images, views, dimensions, classes
TINY_SHAPES = [(4, 2, 8, 3), (8, 2, 16, 5), (12, 3, 16, 20)]

def made_pixels(*shape):
    "Random bytes, the same at every call."
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)

def made_data(n, size, classes):
    "Random pixels in place of photographs: a step costs the same."
    data = ImageArray(made_pixels(n, 3, size, size), torch.arange(n) % classes)
    return LongTailed("made", data, data, [str(i) for i in range(classes)], (0.5,) * 3, (0.25,) * 3)

def in_place_of(name, data):
    "While it is entered, the builder of that name gives `data`."
    return mock.patch.dict(DATASETS, {name: lambda *args, **settings: data})

# --- losses ---

def counts_of(C):
    "Training images of each class, imbalance 100."
    return [max(1, int(500 * 100 ** (-j / max(1, C - 1)))) for j in range(C)]

def made_batch(B, V, D, C):
    "All that any loss reads, in float32; the queue holds as many keys as there are images."
    g = torch.Generator().manual_seed(0)
    unit = lambda *shape: F.normalize(torch.randn(*shape, generator=g), dim=-1)
    return {"z": unit(B, V, D), "centers": unit(C, D), "logits": torch.randn(B, V, C, generator=g),
            "labels": long_tailed_labels(B, C), "queue": unit(B, D), "queue_labels": long_tailed_labels(B, C, seed=1)}

def moved(batch, device, dtype):
    "A copy of a batch on a device; the floating tensors in that type."
    kind = lambda t: dtype if t.is_floating_point() else t.dtype
    return {k: t.to(device, kind(t), copy=True) for k, t in batch.items()}

def loss_cases():
    "name -> (key of `LOSSES`, settings, tensors that get a gradient)."
    cases = {"acl" + note: ("acl", dict(aligned=aligned, negatives=mode), leaves)
             for mode in NEGATIVES for aligned in (True, False)
             for leaves, with_centers in ((["z", "centers"], ", centres"), (["z"], ""))
             for note in [f", {mode}, {'aligned' if aligned else 'not aligned'}{with_centers}"]}
    cases |= {"scl": ("scl", {}, ["z"]), "scl, centres": ("scl", {}, ["z", "centers"])}
    for name, cls in LOSSES.items():
        if name in ("acl", "scl"): continue
        known = signature(cls.forward).parameters
        leaves = [k for k in ("z", "centers", "logits") if k in known or k == "z" and "q" in known]
        cases[name] = (name, {}, leaves)
    return cases

def value_of(loss, name, x, leaves):
    "The loss of a batch, with or without centres."
    if name == "gpaco": return loss(x["z"], x["labels"], x["logits"], x["queue"], x["queue_labels"])
    if name == "paco":
        q = x["z"][:, 0]
        keys, key_labels = torch.cat([q, x["queue"]]), torch.cat([x["labels"], x["queue_labels"]])
        return loss(q, keys, x["labels"], key_labels, x["logits"][:, 0])
    if name == "proco": return loss(x["z"], x["labels"], 0.7 * x["centers"])
    if "z" not in leaves: return loss(x["logits"], x["labels"])
    return loss(x["z"], x["labels"], centers=x["centers"] if "centers" in leaves else None)

def value_and_gradients(case, batch, C, device, dtype):
    "On the CPU, in float64: the value and the gradient of every leaf."
    name, settings, leaves = case
    x = moved(batch, device, dtype)
    for k in leaves: x[k].requires_grad_()
    loss = make_loss(name, class_counts=counts_of(C), **settings).to(device)
    with mock.patch.object(torch, "randn_like", torch.ones_like):       # noise differs between devices
        value = value_of(loss, name, x, leaves)
    value.backward()
    return [t.detach().cpu().double() for t in (value, *(x[k].grad for k in leaves))]

def relative_error(found, wanted):
    "The largest of the tensors' errors, each relative to the norm of what is wanted."
    errors = [(a - b).norm() / b.norm().clamp_min(1e-12) for a, b in zip(found, wanted)]
    return torch.stack(errors).max().item()

@contextmanager
def several_tiles(N, K, method="dense", parts=3):
    "A budget that makes about three tiles, and one way on every device."
    dense = partial(kernels.tiled_loss, method=method)
    with ExitStack() as changed:
        changed.enter_context(mock.patch.object(kernels, "_BUDGET", 4 * K * -(-N // parts)))
        for module in (acl, bcl, scl): changed.enter_context(mock.patch.object(module, "tiled_loss", dense))
        assert kernels._rows(torch.empty(N, 1), K) < N
        yield

def check_losses(bench):
    for shape in bench.pick(SHAPES, TINY_SHAPES):
        B, V, D, C = shape
        batch = made_batch(*shape)
        for name, case in loss_cases().items():
            wanted = value_and_gradients(case, batch, C, "cpu", torch.float64)
            found = lambda: value_and_gradients(case, batch, C, bench.device, torch.float32)
            compare = lambda: relative_error(found(), wanted)
            ways = {"": compare}
            if case[0] in ("acl", "bcl", "scl"):
                def in_tiles():
                    with several_tiles(B * V, B * V + C * ("centers" in case[2])): return compare()
                ways[", several tiles"] = in_tiles
                def by_rows():
                    with several_tiles(B * V, B * V + C * ("centers" in case[2]), "rows"): return compare()
                if row_kernel.runs_on(torch.device(bench.device)): ways[", row kernel, several tiles"] = by_rows
            for way, error_of in ways.items():
                title = f"{name}, {shape}{way}"
                def check():
                    error = error_of()
                    bench.check(title, "relative error", error, "", error <= LOSS_TOLERANCE)
                bench.attempt(title, check)

# --- views and probe ---

def view_bytes(policy, images, size, device):
    "The pixels of two views, 0..255."
    pipeline = ViewPipeline(policy, size, (0.,) * 3, (1.,) * 3, views=2)
    return (pipeline(images.to(device), torch.arange(len(images)), 3) * 255).round().cpu()

def check_views(bench):
    "The package promises the same bytes on every machine, so that one other value is wrong."
    for size, n in bench.pick([(32, 64), (224, 8)], [(32, 4), (224, 1)]):
        for name, policy in POLICIES.items():
            images = photographs(n, size if policy.crop is None else size + size // 8)
            def check():
                here, there = view_bytes(name, images, size, "cpu"), view_bytes(name, images, size, bench.device)
                case, off = f"views {name}, {size} px", (there - here).abs()
                share = (off > 0).double().mean().item()
                bench.check(case, "share of differing values", share, "", share == 0)
                bench.add(case, "largest difference", int(off.max()), "levels of 255")
            bench.attempt(f"views {name}, {size} px", check)

def probed(r, batch, C, device, dtype):
    "What a probe sums up of a batch."
    x = moved(batch, device, dtype)
    asks = x["z"][:, :1] if r.loss == "paco" else x["z"]
    out = Output(asks, x["logits"][:, :asks.shape[1]], x["centers"])
    keys = (x["queue"], x["queue_labels"]) if r.loss in ("paco", "gpaco") else ()
    if r.loss == "proco": keys = 0.7 * x["centers"], torch.arange(C, device=device)
    probe = Probe(r)
    probe.measure(Objective(r.loss, torch.tensor(counts_of(C))).to(device), out, x["labels"], *keys)
    return {k: v.cpu().double() for k, v in probe.sums.items()}

def check_probe(bench):
    B, V, D, C = shape = bench.pick((64, 3, 64, 20), (8, 2, 8, 3))
    batch = made_batch(*shape)
    for loss in losses_that(lambda traits: traits.form is not None):
        def check():
            r = recipe("cifar10_lt", loss=loss)
            wanted = probed(r, batch, C, "cpu", torch.float64)
            found = probed(r, batch, C, bench.device, torch.float32)
            for k in wanted:
                scale = wanted[k].norm() if wanted[k].any() else 1.         # acl repels no positive
                error = float((found[k] - wanted[k]).norm() / scale)
                bench.check(f"probe of {loss}", f"error of {k}", error, "", error <= PROBE_TOLERANCE)
        bench.attempt(f"probe of {loss}", check)

# --- training ---

class Watch:
    "Remembers the weights at the beginning, and how many of their tensors have moved at the end."
    def begin(self, run): self.before = [p.detach().clone() for p in self._learnt(run)]
    def finish(self, run):
        pairs = list(zip(self._learnt(run), self.before))
        self.moved = sum(not torch.equal(p, b) for p, b in pairs) / len(pairs)
        self.finite = all(bool(p.isfinite().all()) for p, _ in pairs)

    @staticmethod
    def _learnt(run):
        "Of the network that is tested, which may be an average without gradients."
        pairs = zip(run.parts.bare.parameters(), run.tested.parameters())
        return [tested for learning, tested in pairs if learning.requires_grad]

TRAININGS = {
    "fp32": dict(precision="fp32"),
    "bf16": dict(precision="bf16"),
    "fp16, scaler": dict(precision="fp16"),
    "deterministic": dict(deterministic=True),
    "compile": dict(compile=True),
    "ema": dict(ema=0.5),
    "paco, queue": dict(loss="paco", views=2, queue=64),
    "accumulate, clip": dict(accumulate=2, clip=1.),
}

def check_training(bench):
    "One epoch of five batches by `fit`, which tests, saves and reports too."
    size, pixels = bench.pick((16, 32), (8, 20))
    usual = dict(encoder=bench.pick("resnet8", "resnet8_tiny"), dim=16, hidden=16,
                 batch_size=size, epochs=1, warmup=0., lr=0.05)
    for name, settings in TRAININGS.items():
        if bench.smoke and name == "compile":
            bench.not_run("training, compile", "too slow for --smoke")
            continue
        r = recipe("cifar10_lt", **usual | settings)
        def check():
            watch, data = Watch(), made_data(5 * size, pixels, 10)
            with tempfile.TemporaryDirectory() as out, in_place_of("cifar10_lt", data):
                row = fit(r, out, quiet=True, callbacks=[watch]).history[-1]
            right = row["loss"] == row["loss"] and watch.finite
            bench.check(f"training, {name}", "mean loss of 5 batches", row["loss"], "", right)
            figure = "share of weight tensors that moved"
            bench.check(f"training, {name}", figure, watch.moved, "", watch.moved > 0.5)
        bench.attempt(f"training, {name}", check)

class Halt(Exception): "Raised in place of a kill."

class HaltAt:
    "Stops a run after a step, without a word to anyone."
    def __init__(self, step): self.step = step
    def after_step(self, run):
        if run.step == self.step: raise Halt()

def small(**more):
    "The small digits recipe that the tests of resuming use."
    return recipe("digits_lt", **dict(pair.split("=") for pair in SMALL) | more)

def check_resume(bench):
    "Must be bit for bit where operations are deterministic; else it is only recorded."
    for deterministic in (True, False):
        case, r = "resume, deterministic" if deterministic else "resume", small(epochs=3, deterministic=deterministic)
        def check():
            with tempfile.TemporaryDirectory() as folder:
                whole, halved = Path(folder)/"whole", Path(folder)/"halved"
                fit(r, whole, quiet=True)
                try: fit(r, halved, quiet=True, save_every=0., callbacks=[HaltAt(8)])
                except Halt: pass
                assert latest(halved/"checkpoint"), "there is no checkpoint to go on from"
                fit(r, halved, quiet=True, resume="must")
                same = content(halved) == content(whole)
            bench.check(case, "bit-identical", same, "true or false", same or not deterministic)
        bench.attempt(case, check)

# A group of one: the collectives on the device, then a run whose network is wrapped for processes.
GROUP = """
import sys, json, torch, torch.distributed as dist
from acl_nb.recipes import recipe
from acl_nb.trainer import fit
gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
t = torch.arange(3., device="cuda" if gpu else "cpu")
parts = [torch.empty_like(t)]
dist.all_gather(parts, t)
dist.all_reduce(t, dist.ReduceOp.MAX)
dist.broadcast(t, 0)
assert parts[0].tolist() == t.tolist() == [0, 1, 2]
class Name:
    def finish(self, run): print(dist.get_backend(), type(run.parts.network).__name__)
r = recipe("digits_lt", **json.loads(sys.argv[1]), epochs=1, sync_bn=gpu)
fit(r, sys.argv[2], quiet=True, callbacks=[Name()])
dist.destroy_process_group()
"""

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])

def environment(**more):
    "Of a child process that imports this copy of the package."
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **more}

def end_all(process, number=signal.SIGKILL):
    "Signal a process's whole group; it may be gone."
    try: os.killpg(process.pid, number)
    except ProcessLookupError: pass

def start(arguments, said, **env):
    "A Python process in a session of its own, which writes to a file."
    return subprocess.Popen([sys.executable, *arguments], stdout=said, stderr=subprocess.STDOUT, cwd=ROOT,
                            env=environment(**env), start_new_session=True)

def said_by(arguments, limit, **env):
    "(exit code or None at the time limit, lines) of a Python process in a session of its own."
    with tempfile.TemporaryFile("w+") as said:
        process = start(arguments, said, **env)
        try: code = process.wait(limit)
        except subprocess.TimeoutExpired: code = None
        end_all(process)
        process.wait()
        said.seek(0)
        return code, said.read().splitlines()

def check_group(bench):
    name = "NCCL group of one, sync_bn" if bench.cuda else "gloo group of one"
    env = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
               MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    settings = json.dumps(dict(pair.split("=") for pair in SMALL if not pair.startswith("epochs=")))
    with tempfile.TemporaryDirectory() as out:
        code, lines = said_by(["-c", GROUP, settings, str(Path(out)/"run")], 120, **env)
    bench.check(name, "exit code", "time limit" if code is None else code, "", code == 0)
    bench.add(name, "last line", lines[-1] if lines else "", "text")

def right(bench):
    "Are results on the device those of the CPU?"
    for check in (check_losses, check_views, check_probe, check_training, check_resume, check_group):
        bench.attempt(check.__name__.replace("check_", ""), check, bench)

# --- a signal to all processes of a run ---

STOPPED = """
import json, sys
from pathlib import Path
from acl_nb.commands import command
from acl_nb.recipes import recipe
from acl_nb.trainer import fit
class Third:
    def after_step(self, run):
        if run.step == 3: Path(sys.argv[2], "third").touch()
@command
def train():
    r = recipe("cifar10_lt", **json.loads(sys.argv[1]))
    fit(r, Path(sys.argv[2], "run"), workers=2, callbacks=[Third()])
train()
"""

def write_folder(root, classes=4, n=100, size=40):
    "Small JPEG files in folders of their classes, train and test."
    from PIL import Image
    pixels = made_pixels(classes, size, size, 3)
    for part, many in ("train", n), ("test", 2):
        for c in range(classes):
            folder = root/part/f"class{c}"
            folder.mkdir(parents=True)
            for i in range(many): Image.fromarray(pixels[c].numpy()).save(folder/f"{i}.jpg")

def signal_all(bench):
    "SIGTERM to training and loader workers at once, as SLURM and torchrun send it."
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_folder(folder/"data")
        settings = dict(dataset="folder_lt", imbalance="as_is", size=32, data=str(folder/"data"),
                        encoder="resnet8", dim=8, hidden=8, epochs=50, batch_size=4)
        with open(folder/"said", "w") as said:
            process = start(["-c", STOPPED, json.dumps(settings), str(folder)], said)
        try: code, began = stop_at_third_step(process, folder)
        finally:
            end_all(process)
            process.wait()
        lines = (folder/"said").read_text().splitlines()
        case = "SIGTERM to the process group, 2 workers"
        assert began, f"the run ended before its third step: {lines[-1:]}"
        there = latest(folder/"run"/"checkpoint") is not None
        bench.add(case, "a checkpoint is there", there, "true or false")
        bench.add(case, "exit code", "time limit" if code is None else code, "")
        bench.add(case, "last line", lines[-1].strip() if lines else "", "text")

def stop_at_third_step(process, folder, limit=120):
    "(exit code or None, did the run get as far?)"
    end = time.monotonic() + limit
    third = folder/"third"
    while not third.exists() and process.poll() is None and time.monotonic() < end: time.sleep(0.01)
    began = third.exists() and process.poll() is None
    end_all(process, signal.SIGTERM)
    try: return process.wait(60), began
    except subprocess.TimeoutExpired: return None, began

# --- commands and tests ---

def suite(bench):
    "`acl_doctor` and the tests, as a user of this machine would run them."
    doctor = ["-c", "from acl_nb.doctor import acl_doctor; acl_doctor()"]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    chosen = ["-k", "not browser and not site", "--ignore", "tests/test_site.py", "--continue-on-collection-errors"]
    full = {"acl_doctor": doctor, "pytest": [*tests, "tests", *chosen]}      # the site's tests import nbdev
    one_check = "from acl_nb.doctor import CHECKS, diagnose; print(diagnose(checks={'devices': CHECKS['devices']}))"
    tiny = {"one check of acl_doctor": ["-c", one_check],
            "pytest --collect-only": [*tests, "--collect-only", "tests/test_losses.py"]}
    for case, arguments in bench.pick(full, tiny).items():
        code, lines = said_by(arguments, 240)
        bench.add(case, "exit code", "time limit of 240 s" if code is None else code, "")
        bench.add(case, "last lines", "\n".join(lines[-15:]), "text")
