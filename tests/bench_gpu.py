"""Right results and speed on one GPU, in about ten minutes. `python tests/bench_gpu.py`

Rows go to bench/gpu.json; a section that fails is a row, and the next one runs. No time is asserted.
`--smoke` runs tiny shapes in under a minute, without a GPU too, and shows only that sections work.
"""
import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import acl_nb
from acl_nb.memory import stand_in
from acl_nb.losses import acl_loss, scl_loss
from acl_nb.build import build
from acl_nb.recipes import recipe
from acl_nb.judging import predict
from acl_nb.loop import Training
from acl_nb.views import ViewPipeline
from bench_losses import batch, forward_backward, peak_bytes, peer
from bench_step import whole_step
from bench_views import MEAN, STD
from benching import ROOT, Rows
from gpu_checks import counts_of, in_place_of, made_data, made_pixels, right, signal_all, suite

PACKAGE = Path(acl_nb.__file__).parent
CROPS = (256, 3, 3, 224, 224)    # of one ImageNet batch: images, views, channels, pixels; 115.6 MB

class Bench:
    "What every section is given: the device, the rows, and how to measure."
    def __init__(self, rows, smoke=False):
        self.rows, self.smoke, self.cuda = rows, smoke, torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.section, self.made, self.bad = None, [], []

    def pick(self, full, tiny):
        "The full shapes, or those of the smoke run."
        return tiny if self.smoke else full

    def add(self, case, figure, value, unit, partner=None):
        "Keep one number or text."
        if isinstance(value, float) and not math.isfinite(value): value = str(value)    # JSON has no nan
        self.made.append(self.rows.add(self.section, case, figure, value, unit, partner))

    def not_run(self, case, why="needs CUDA"): self.add(case, "not run", why, "text")

    def check(self, case, figure, value, unit, is_right):
        "Keep a number that says whether a result is right, and say so where it is not."
        self.add(case, figure, value, unit)
        if not is_right:
            self.bad.append(case)
            self.add(case, "wrong", f"{figure} {value}", "text")

    def attempt(self, case, f, *args):
        "Run a part of a section; what it raises becomes a row."
        try: f(*args)
        except Exception as e:
            said = str(e).strip().splitlines() or [""]
            self.bad.append(case)
            self.add(case, "failed", f"{type(e).__name__}: {said[0]}"[:300], "text")

    def wait(self):
        if self.cuda: torch.cuda.synchronize()

    def tidy(self):
        "Give back memory and compiled code."
        torch._dynamo.reset()
        gc.collect()
        if self.cuda: torch.cuda.empty_cache()

    def wall(self, step, n, warm=3):
        "Mean milliseconds of a step among n, by the clock."
        for _ in range(warm): step()
        self.wait()
        began = time.perf_counter()
        for _ in range(n): step()
        self.wait()
        return 1e3 * (time.perf_counter() - began) / n

    def ms(self, step, n=10, warm=3):
        "Median milliseconds of a step: CUDA events, or the clock on a CPU."
        for _ in range(warm): step()
        marks = Marks(self.cuda)
        for k in range(n):
            marks(f"before {k}")
            step()
            marks(f"step {k}")
        found = marks.ms()
        return statistics.median(found[f"step {k}"] for k in range(n))

    @contextmanager
    def peak(self, into):
        "Note the most bytes allocated meanwhile: in total, and above what was there before."
        if self.cuda:
            self.wait()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        yield
        if self.cuda:
            self.wait()
            most = torch.cuda.max_memory_allocated()
            into.update(total=most, more=most - before)

class Marks:
    "Named moments: CUDA events in the stream, or the clock."
    def __init__(self, cuda): self.cuda, self.moments = cuda, []

    def __call__(self, name):
        if not self.cuda: return self.moments.append((name, time.perf_counter()))
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.moments.append((name, event))

    def ms(self):
        "name -> milliseconds since the mark before it."
        if self.cuda: torch.cuda.synchronize()
        between = lambda a, b: a.elapsed_time(b) if self.cuda else 1e3 * (b - a)
        return {name: between(a, b) for (_, a), (name, b) in zip(self.moments, self.moments[1:])}

# --- constants of the machine ---

@contextmanager
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try: yield
    finally: torch.backends.cuda.matmul.allow_tf32 = before

def constants(bench):
    "What estimates scale with: bandwidth, products, the cost of an operation and of a synchronisation."
    n, reps = bench.pick(2**28, 2**20), bench.pick(10, 3)
    a, b = torch.zeros(n, device=bench.device), torch.empty(n, device=bench.device)
    ms = bench.ms(lambda: b.copy_(a), reps)
    bench.add("copy", "bandwidth, read and written", 8 * n / ms / 1e6, "GB/s")
    del a, b
    side = bench.pick(4096, 128)
    def product(case, dtype):
        x = torch.randn(side, side, device=bench.device, dtype=dtype)
        ms = bench.ms(lambda: x @ x, reps)
        bench.add(f"product of {side} × {side}, {case}", "rate", 2 * side**3 / ms / 1e9, "TFLOP/s")
    product("float32", torch.float32)
    product("bfloat16", torch.bfloat16)
    if bench.cuda:
        with tf32(): product("TF32", torch.float32)
    else: bench.not_run("product, TF32")
    x, many = torch.zeros(1, device=bench.device), bench.pick(2000, 100)
    add, item = bench.wall(lambda: x.add_(1), many), bench.wall(x.item, many)
    bench.add("x.add_(1)", "time per eager operation", 1e3 * add, "µs")
    bench.add("x.item()", "time per call", 1e3 * item, "µs")

# --- synchronisations ---

def call_site(frames):
    "file:line and function of the innermost frame inside the package."
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.lineno} {frame.name}"
    return "outside acl_nb"

def sites_of_warnings(step, text):
    "Counter of the call sites of the warnings with that text."
    sites = Counter()
    def note(message, *rest):
        if text in str(message): sites[call_site(traceback.extract_stack())] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        step()
    return sites

def syncs(bench):
    "How often the host waits for the GPU in one CIFAR step, and where."
    if not bench.cuda: return bench.not_run("CIFAR step")
    step = whole_step(cifar_run(bench))
    for _ in range(3): step()
    torch.cuda.set_sync_debug_mode("warn")
    try: sites = sites_of_warnings(step, "synchronizing CUDA operation")
    finally: torch.cuda.set_sync_debug_mode("default")
    bench.add("CIFAR step", "synchronisations", sum(sites.values()), "per step")
    for site, n in sites.most_common(): bench.add(site, "synchronisations", n, "per step")

# --- training steps ---

def cifar_run(bench, **more):
    tiny = dict(encoder="resnet8", dim=16, hidden=16, batch_size=8)
    r = recipe("cifar100_lt", **bench.pick(dict(batch_size=256), tiny), epochs=10_000, **more)
    data = made_data(10 * r.batch_size, 32, bench.pick(100, 10))
    with in_place_of(r.dataset, data): return Training(build(r))

def imagenet_run(bench, size, **more):
    "(run, a batch of made crops as workers hand them over: uint8, pinned where there is a GPU)"
    tiny = dict(encoder="resnet8", dim=16, hidden=16, classes=None)
    pixels, classes = bench.pick((224, 1000), (32, 10))
    more = bench.pick({}, tiny) | more
    r = recipe("imagenet_lt_resnet50_90", batch_size=size, epochs=10_000, **more)
    data = stand_in([3, pixels, pixels], torch.full((classes,), 2))
    with in_place_of(r.dataset, data): run = Training(build(r, workers=0))
    crops = made_pixels(size, r.views, 3, pixels, pixels)
    ids = torch.arange(size)
    run.parts.network.train()
    return run, (crops.pin_memory() if bench.cuda else crops, ids % classes, ids)

def marked_step(run, one_batch, marks):
    "The trainer's step, with a mark after each part; without its tests for numbers that are none."
    p, (images, labels, ids) = run.parts, one_batch
    p.optimizer.zero_grad(set_to_none=True)
    marks("start")
    images, labels = images.to(p.device), labels.to(p.device)
    marks("copy to the device")
    views = p.views(images, ids, 0)
    marks("views")
    with p.half(): out = p.network(views)
    marks("forward")
    loss, _ = p.objective(out, labels)
    marks("loss")
    p.scaler.scale(loss).backward()
    marks("backward")
    p.scaler.step(p.optimizer)
    p.scaler.update()
    marks("optimiser")

def parts_of_step(bench, run, one_batch, n):
    "part -> median milliseconds."
    found = defaultdict(list)
    for k in range(-2, n):
        marks = Marks(bench.cuda)
        marked_step(run, one_batch, marks)
        for name, ms in marks.ms().items():
            if k >= 0 and name != "start": found[name].append(ms)
    return {name: statistics.median(ms) for name, ms in found.items()}

def busy_ms(step, n):
    "Milliseconds per step in which the GPU runs kernels or copies; what overlaps counts once."
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        for _ in range(n): step()
        torch.cuda.synchronize()
    events, gpu = prof.profiler.kineto_results.events(), torch.autograd.DeviceType.CUDA
    # annotations span the idle time between kernels as well
    work = [e for e in events if e.device_type() == gpu and not e.is_user_annotation()]
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in work)
    busy, reached = 0, 0
    for start, end in spans:
        busy += max(0, end - max(start, reached))
        reached = max(reached, end)
    return busy / n / 1e6

def measured_step(bench, run, step, one_batch, n):
    "[(figure, value, unit)] of a whole step and its parts."
    memory = {}
    with bench.peak(memory): whole = bench.wall(step, n, warm=bench.pick(5, 1))
    rate = 1e3 * run.parts.recipe.batch_size / whole
    found = [("whole step", whole, "ms"), ("images", rate, "images/s")]
    found += [(name, ms, "ms") for name, ms in parts_of_step(bench, run, one_batch, n).items()]
    return [*found, ("peak memory", memory["total"] / 2**30, "GiB")] if bench.cuda else found

def idle_share(bench, case, step, whole):
    "How much of a whole step, in ms as it runs without the profiler, the GPU has nothing to do."
    if not bench.cuda: return bench.add(case, "not run", "idle share and peak memory need CUDA", "text")
    busy = busy_ms(step, 3)
    bench.add(case, "GPU busy, by the profiler", busy, "ms")
    bench.add(case, "idle share: 1 - busy / whole step", 1 - busy / whole, "")

def loading_ms(run, n):
    "Median milliseconds until the loader gives a batch, on the host."
    spent = []
    while len(spent) < n:
        batches = iter(run.parts.loader)
        next(batches)                               # begins the epoch
        while len(spent) < n:
            began = time.perf_counter()
            if next(batches, None) is None: break
            spent.append(1e3 * (time.perf_counter() - began))
    return statistics.median(spent)

def as_is_and_compiled(bench, measure):
    for name, settings in {"as is": {}, "compile=True": dict(compile=True)}.items():
        if bench.smoke and settings: bench.not_run(name, "too slow for --smoke")
        else: bench.attempt(name, measure, name, settings)
        bench.tidy()

def step_name(parts):
    r = parts.recipe
    return f"{r.encoder}, {r.batch_size} × {r.views} views, {parts.setup['precision']}"

def cifar(bench):
    "A CIFAR step."
    n = bench.pick(30, 2)
    def measure(name, settings):
        run = cifar_run(bench, **settings)
        p, one_batch = run.parts, next(iter(run.parts.loader))
        p.network.train()
        case, step = f"{step_name(p)}, {name}", whole_step(run)
        found = measured_step(bench, run, step, one_batch, n)
        for figure in found: bench.add(case, *figure)
        bench.attempt(case, idle_share, bench, case, step, found[0][1])
        bench.add(case, "loading, on the host", loading_ms(run, n), "ms")
    as_is_and_compiled(bench, measure)

def imagenet(bench):
    "An ImageNet step of made crops; a smaller batch where the memory holds no larger one."
    n, sizes = bench.pick((12, (256, 128, 64, 32)), (2, (2,)))
    def figures(size, settings):
        run, one_batch = imagenet_run(bench, size, **settings)
        step = lambda: run.train_step([one_batch])
        return step_name(run.parts), measured_step(bench, run, step, one_batch, n), step
    def measure(name, settings):
        for size in sizes:
            try: case, found, step = figures(size, settings)
            except torch.cuda.OutOfMemoryError: found = None
            if found: break
            bench.tidy()                # outside of the exception, which holds what filled the memory
        else: raise MemoryError(f"not even {sizes[-1]} images fit")
        smaller = "" if size == sizes[0] else f" ({sizes[0]} images do not fit)"
        case = f"{case}, {name}{smaller}"
        for figure in found: bench.add(case, *figure)
        bench.attempt(case, idle_share, bench, case, step, found[0][1])
    as_is_and_compiled(bench, measure)
    bench.not_run("loading", "crops are made, no file is decoded")

# --- losses and views alone ---

def supcontrast(z, labels, temperature=0.1):
    "SupContrast's loss, restated: whole matrices, left to autograd."
    z, labels = z.flatten(0, 1), labels.repeat_interleave(z.shape[1])
    logits = z @ z.T / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), device=z.device)
    positive = (labels[:, None] == labels).float() * others
    log_share = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((positive * log_share).sum(1) / positive.sum(1)).mean()

RESTATED = "SupContrast, restated, no centres"
PEER = "SupConLoss of pytorch-metric-learning, no centres"
LOSS_SHAPES = [(256, 3, 128, 100), (256, 3, 1024, 8142), (4096, 4, 128, 1000)]    # images, views, dimensions, classes

def loss_steps(bench, shape):
    "case -> forward and backward."
    z, labels, centers = batch(*shape)
    z, centers = (t.detach().to(bench.device).requires_grad_() for t in (z, centers))
    labels, counts = labels.to(bench.device), torch.tensor(counts_of(shape[3]), device=bench.device)
    adjusted = dict(negatives="adjusted", class_counts=counts)
    table = {RESTATED: lambda: supcontrast(z, labels),
             "scl, no centres": lambda: scl_loss(z, labels),
             "acl, batch": lambda: acl_loss(z, labels, centers),
             "acl, adjusted": lambda: acl_loss(z, labels, centers, **adjusted)}
    if supcon := peer(z, labels): table[PEER] = supcon
    return {case: forward_backward(f, z, centers) for case, f in table.items()}

def time_and_peak(bench, step):
    "(ms, peak MiB), or None where it does not fit."
    memory = {}
    try:
        ms = bench.ms(step, bench.pick(10, 2), warm=bench.pick(3, 1))
        with bench.peak(memory): step()
    except torch.cuda.OutOfMemoryError: return None
    return ms, (memory["more"] if bench.cuda else peak_bytes(step)) / 2**20

def loss(bench):
    "The losses alone, forward and backward."
    for shape in bench.pick(LOSS_SHAPES, [(8, 2, 8, 3)]):
        found, name = {}, "{}, " + str(shape)
        def measure(case, step):
            found[case] = time_and_peak(bench, step)
            if found[case] is None:
                return bench.not_run(name.format(case), "does not fit into memory")
            bench.add(name.format(case), "forward and backward", found[case][0], "ms")
            bench.add(name.format(case), "peak memory", found[case][1], "MiB")
        steps = loss_steps(bench, shape)
        for case, step in steps.items():
            bench.attempt(name.format(case), measure, case, step)
            bench.tidy()
        if PEER not in steps:
            bench.not_run(name.format(PEER), "pytorch-metric-learning is not installed")
        for partner in (RESTATED, PEER):
            for case in found:
                if case in (RESTATED, PEER) or not (found[case] and found.get(partner)): continue
                for k, figure in enumerate(("time ratio", "peak memory ratio")):
                    ratio = found[case][k] / found[partner][k]
                    bench.add(name.format(case), figure, ratio, "×", name.format(partner))

def views(bench):
    "Views alone; GB/s counts the bytes of the float32 views that come out, nothing else."
    small = ["cifar_regular", "cifar_sim", "cifar_sim_blur", "cifar_regular+cifar_sim"]
    large = ["imagenet_rand", "imagenet_sim", "imagenet_sim_rand", "imagenet_rand+imagenet_sim"]
    n, V = bench.pick(256, 2), 3
    for size, names in (32, small), (bench.pick(224, 64), large):
        for name in names:
            policies = [name.split("+")[min(v, name.count("+"))] for v in range(V)]
            pipeline = ViewPipeline(policies, size, MEAN, STD)
            cut = (V,) if names is large else ()            # files come as crops, one for each view
            images = made_pixels(n, *cut, 3, size, size).to(bench.device)
            ids = torch.arange(n, device=bench.device)
            ms = bench.ms(lambda: pipeline(images, ids, 0), bench.pick(10, 2), bench.pick(3, 1))
            case = f"{name}, {n} × {V} views, {size} px"
            bench.add(case, "time", ms, "ms")
            bench.add(case, "output", 4 * n * V * 3 * size**2 / ms / 1e6, "GB/s")

def prediction(bench):
    "Images per second of `predict`."
    n = bench.pick(4096, 16)
    for encoder, size in bench.pick([("resnet32", 32), ("resnet50", 224)], [("resnet8", 32)]):
        data = stand_in([3, size, size], torch.full((16,), n // 16))
        r = recipe("cifar10_lt", encoder=encoder, batch_size=16)
        with in_place_of(r.dataset, data): p = build(r)
        step = lambda: predict(p.bare, p.test_loader, p.plain, len(p.test), p.setup["test_precision"])
        ms = bench.wall(step, bench.pick(3, 1), warm=1)
        bench.add(f"{encoder}, {n} images, {size} px", "predict", 1e3 * n / ms, "images/s")

def copies(bench):
    "One batch of ImageNet crops from host to device."
    if not bench.cuda: return bench.not_run("115.6 MB to the device")
    crops = torch.zeros(bench.pick(CROPS, (2, *CROPS[1:])), dtype=torch.uint8)
    pinned, there = crops.pin_memory(), torch.empty_like(crops, device=bench.device)
    steps = {"pageable": lambda: there.copy_(crops), "pinned": lambda: there.copy_(pinned),
             "pinned, non_blocking": lambda: there.copy_(pinned, non_blocking=True)}
    for name, step in steps.items():
        rate = crops.nbytes / bench.wall(step, 10) / 1e6
        bench.add(f"{crops.nbytes / 1e6:.1f} MB, {name}", "rate", rate, "GB/s")

# --- all of it ---

SECTIONS = {"constants": constants, "right": right, "syncs": syncs, "cifar": cifar, "imagenet": imagenet,
            "loss": loss, "views": views, "predict": prediction, "copies": copies, "signal": signal_all,
            "suite": suite}

def run_sections(bench, names):
    "One after another; rows are written after each."
    for name in names:
        bench.section, began = name, time.perf_counter()
        bench.rows.begin(name)
        bench.attempt(name, SECTIONS[name], bench)
        bench.tidy()
        bench.rows.write()
        print(f"{name:12}{time.perf_counter() - began:8.1f} s", flush=True)

def short(value):
    "A number in four digits; of a text its last line."
    if isinstance(value, float): return f"{value:.4g}"
    lines = str(value).strip().splitlines() or [""]
    return lines[-1][:60]

def print_table(bench):
    "All figures but those of `right`, of which it says how many there are and which are wrong."
    for r in bench.made:
        if r["section"] == "right" and r["figure"] not in ("wrong", "failed", "not run"): continue
        where = f"{r['section']:10} {r['case'][:66]:66} {r['figure'][:36]:36}"
        print(where, short(r["value"]), "" if r["unit"] == "text" else r["unit"])
    checks = sum(r["section"] == "right" for r in bench.made)
    print(f"{checks} rows of results compared; {len(bench.bad)} wrong or failed in all", flush=True)

def fail(said):
    print(said, file=sys.stderr)
    return 2

def main(arguments=None):
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--only", help="sections, joined by commas")
    ask.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU too")
    where = "file of rows; default: bench/gpu.json, with --smoke one in the temporary folder"
    ask.add_argument("--out", type=Path, help=where)
    ask.add_argument("--list", action="store_true", help="print the sections and run none")
    args = ask.parse_args(arguments)
    if args.list:
        for name, f in SECTIONS.items(): print(f"{name:12}{f.__doc__}")
        return 0
    names = list(SECTIONS) if args.only is None else args.only.split(",")
    if any(name not in SECTIONS for name in names):
        return fail(f"--only takes sections joined by commas, of {', '.join(SECTIONS)}; got {args.only}")
    if not (args.smoke or torch.cuda.is_available()):
        return fail("no CUDA device was found, which this needs; --smoke runs tiny shapes on the CPU")
    trial = Path(tempfile.gettempdir())/"acl_nb_gpu_smoke.json"
    rows = Rows(args.out or (trial if args.smoke else ROOT/"bench"/"gpu.json"))
    bench = Bench(rows, args.smoke)
    print(f"{rows.about['device']}, torch {torch.__version__}; rows go to {rows.path}", flush=True)
    run_sections(bench, names)
    print_table(bench)
    return 1 if bench.bad else 0

if __name__ == "__main__": sys.exit(main())
