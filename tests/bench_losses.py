"""Speed and memory of the losses against the three matrix products they cannot do without.

`python tests/bench_losses.py`

One thread, processor time, interleaved rounds in one process, medians of the ratios of each round.
Needs nothing but the package; pytorch-metric-learning is compared with where it is installed.
"""
import os
os.environ["KINETO_LOG_LEVEL"] = "99"      # the profiler is quiet

import argparse
import statistics

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from acl_nb.losses.acl import acl_loss, acl_loss_plain
from acl_nb.losses.bcl import bcl_loss
from acl_nb.kernels import matmul_route
from acl_nb.losses.scl import scl_loss
from benching import Rows, interleaved, median_ratio, out_option, processor_name

# images, views, dimensions, classes
SHAPES = [(256, 4, 128, 100), (512, 4, 128, 1000), (256, 3, 128, 10), (256, 3, 1024, 8142)]
LIMIT, WITH_SOFTMAX = "three products", "products and softmax"

class ThreeProducts:
    "Z Kᵀ, S K, Sᵀ Z into memory that is there: what every loss of this kind has to do."
    def __init__(self, z, centers):
        self.z = z.detach().flatten(0, 1)
        self.k = torch.cat([self.z, centers.detach()])
        self.s = self.z.new_empty(len(self.z), len(self.k))
        self.dz, self.dk = torch.empty_like(self.z), torch.empty_like(self.k)

    def __call__(self):
        torch.mm(self.z, self.k.T, out=self.s)
        self.between()
        torch.mm(self.s, self.k, out=self.dz)
        torch.mm(self.s.T, self.z, out=self.dk)

    def between(self):
        "Nothing, for the limit."

class WithSoftmax(ThreeProducts):
    "And an exponential of every pair."
    def between(self): torch.softmax(self.s, 1, out=self.s)

def long_tailed_labels(n, n_classes, imbalance=100, seed=0):
    share = imbalance ** (-torch.arange(n_classes, dtype=torch.float64) / (n_classes - 1))
    return torch.multinomial(share, n, replacement=True, generator=torch.Generator().manual_seed(seed))

def batch(B, V, D, C, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(B, V, D, generator=g), dim=-1).requires_grad_()
    centers = F.normalize(torch.randn(C, D, generator=g), dim=-1).requires_grad_()
    return z, long_tailed_labels(B, C), centers

def forward_backward(f, *leaves):
    def step():
        f().backward()
        for t in leaves: t.grad = None
    return step

def peer(z, labels):
    "pytorch-metric-learning's SupConLoss on all views as one batch, or None. It has no centres."
    try: from pytorch_metric_learning.losses import SupConLoss
    except ImportError: return None
    loss, every = SupConLoss(temperature=0.1), labels.repeat_interleave(z.shape[1])
    return lambda: loss(z.flatten(0, 1), every)

def candidates(B, V, D, C, with_plain):
    z, labels, centers = batch(B, V, D, C)
    counts = [max(1, int(500 * 100 ** (-j / (C - 1)))) for j in range(C)]
    table = {
        "ACL batch": lambda: acl_loss(z, labels, centers),
        "ACL adjusted": lambda: acl_loss(z, labels, centers, negatives="adjusted", class_counts=counts),
        "SCL + centres": lambda: scl_loss(z, labels, centers=centers),
        "SCL": lambda: scl_loss(z, labels),
        "BCL": lambda: bcl_loss(z, labels, centers),
    }
    if with_plain: table["ACL plain"] = lambda: acl_loss_plain(z, labels, centers)
    supcon = peer(z, labels)
    if supcon and B * V <= 2048 and C <= 1000: table["SupConLoss (peer, no centres)"] = supcon
    steps = {name: forward_backward(f, z, centers) for name, f in table.items()}
    return {LIMIT: ThreeProducts(z, centers), WITH_SOFTMAX: WithSoftmax(z, centers)} | steps

def peak_bytes(step):
    "Most memory alive at one time above what was alive before."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: step()
    memory = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for e in sorted(memory, key=lambda e: e.start_ns()):
        alive += e.nbytes()
        peak = max(peak, alive)
    return peak

def report(shape, rounds, with_plain, rows):
    "Measure one shape, print its table and keep its rows."
    B, V, D, C = shape
    N, K = B * V, B * V + C
    matrix = 4 * N * K
    section = f"{B} images, {V} views, {D} dimensions, {C} classes"
    print(f"\n{section}: N×K = {N} × {K}, one matrix = {matrix / 2**20:.1f} MiB")
    print(f"{'':32}{'ms':>9}{'× products':>12}{'× ACL batch':>13}{'peak, NK':>10}{'peak, MiB':>11}")
    steps = candidates(*shape, with_plain)
    seconds = interleaved(steps, rounds)
    rows.begin(section)
    for name, s in seconds.items():
        ms, peak = 1e3 * statistics.median(s), peak_bytes(steps[name])
        to_limit, to_ours = (median_ratio(s, seconds[partner]) for partner in (LIMIT, "ACL batch"))
        rows.add(section, name, "time", ms, "ms")
        rows.add(section, name, "time ratio", to_limit, "×", LIMIT)
        rows.add(section, name, "time ratio", to_ours, "×", "ACL batch")
        rows.add(section, name, "peak", peak / 2**20, "MiB")
        rows.add(section, name, "peak", peak / matrix, "N×K")
        print(f"{name:32}{ms:9.1f}{to_limit:12.2f}{to_ours:13.2f}{peak / matrix:10.2f}{peak / 2**20:11.1f}", flush=True)
    rows.write()

def main():
    every = range(len(SHAPES))
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=15, help="interleaved rounds for each shape")
    ask.add_argument("--plain", action="store_true", help="the plain autograd form too")
    ask.add_argument("--shapes", type=int, nargs="*", default=every, help=f"which of {SHAPES}, by position")
    out_option(ask, "losses")
    args = ask.parse_args()
    torch.set_num_threads(1)
    route = f"product: {matmul_route()} (ACL_NB_MATMUL=onednn tries the other)"
    print(f"torch {torch.__version__}, one thread, float32; {route}")
    rows = Rows(args.out, processor_name())
    for i in args.shapes: report(SHAPES[i], args.rounds, args.plain, rows)

if __name__ == "__main__": main()
