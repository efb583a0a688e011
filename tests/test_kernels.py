"The row kernel in Triton's interpreter, without a GPU, against float64."
import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch

from acl_nb import kernels
from acl_nb.kernels import Weights, tiled_loss
from acl_nb.losses import acl, acl_loss, bcl, bcl_loss, scl, scl_loss
from acl_nb.losses.acl import acl_loss_plain
from acl_nb.losses.bcl import bcl_loss_plain
from acl_nb.losses.scl import scl_loss_plain
from acl_nb.pairs import NEGATIVES
from acl_nb.processes import Share
from acl_nb.testing import degenerate_batches, finite, loss_and_grads, random_batch

FAMILIES = {"scl": (scl_loss, scl_loss_plain, {}), "bcl": (bcl_loss, bcl_loss_plain, {})}
for negatives, aligned in product(NEGATIVES, (True, False)):
    settings = dict(negatives=negatives, aligned=aligned)
    name = f"acl {negatives}" + ("" if aligned else ", not aligned")
    FAMILIES[name] = acl_loss, acl_loss_plain, settings

def interpreted(f, *args):
    "Run a function of this file in a process of its own, in which Triton interprets."
    pytest.importorskip("triton")
    code = f"import test_kernels; test_kernels.{f.__name__}(*{args!r})"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    how = dict(cwd=Path(__file__).parent, env=env, capture_output=True, text=True, timeout=1200)
    r = subprocess.run([sys.executable, "-c", code], **how)
    assert r.returncode == 0, r.stderr[-3000:]
    print(r.stdout)

def by_rows():
    "The losses take the row kernel, in the processor's memory."
    changed = mock.patch.multiple
    with_rows = partial(tiled_loss, method="rows")
    return [changed(module, tiled_loss=with_rows) for module in (scl, bcl, acl)]

def in_tiles(N, K, of):
    "A budget of bytes with which N anchors make about `of` tiles."
    return mock.patch.object(kernels, "_BUDGET", 4 * (K + 16) * -(-N // of))

def error(found, wanted, least=1e-9):
    "The largest of the tensors' errors, each relative to the norm of what is wanted, or to `least`."
    pairs = zip(found, wanted, strict=True)
    return max(((a - b).norm() / b.norm().clamp_min(least)).item() for a, b in pairs)

def compared(loss, plain, batch, tiles=1, least=1e-9, **settings):
    "Error by the row kernel in float32 against the plain formula in float64; and the value."
    z, labels, centers = batch
    leaves = (z,) if centers is None else (z, centers)
    of = lambda f: lambda z, c=None: f(z, labels, centers=c, **settings)
    wanted = loss_and_grads(of(plain), *(leaf.double() for leaf in leaves))
    N = len(labels) * z.shape[1]
    first, second, third = by_rows()
    with first, second, third, in_tiles(N, N + len(centers if centers is not None else []), tiles):
        found = loss_and_grads(of(loss), *leaves)
    assert all(t.isfinite().all() for t in found)
    return error(found, wanted, least), wanted[0].item()

def random_batches(*families):
    for family in families: random_batches_of(family)

def random_batches_of(family):
    loss, plain, settings = FAMILIES[family]
    g, worst = torch.Generator().manual_seed(0), 0
    for seed in range(20):
        ranges = (2, 13), (1, 4), (2, 33), (2, 9)
        B, V, D, C = (int(torch.randint(low, high, (), generator=g)) for low, high in ranges)
        z, labels, centers = random_batch(B, V, D, C, seed, torch.float32)
        more = dict(class_counts=torch.arange(C, 0, -1) * 9) if "negatives" in settings else {}
        given = centers if seed % 2 or family == "bcl" else None
        more |= dict(temperature=(0.1, 0.07, 0.05)[seed % 3], tiles=1 + seed % 4)
        off, value = compared(loss, plain, (z, labels, given), **settings, **more)
        assert off <= 1e-6 or value < 1e-9, (family, seed, off, value)
        worst = max(worst, off)
    print(f"{family}: {worst:.1e}")

@pytest.mark.parametrize("family", ["scl", "bcl", "acl"])
def test_random_batches(family):
    interpreted(random_batches, *[name for name in FAMILIES if name.startswith(family)])

def poor_batches():
    worst = 0
    for (loss, plain, settings), V in product(FAMILIES.values(), (1, 2)):
        for name, (z, labels, centers) in degenerate_batches(V, dtype=torch.float32).items():
            for given in (centers, None):
                if loss is bcl_loss and given is None: continue
                counts = torch.tensor([40, 9, 3, 1])
                more = dict(class_counts=counts) if "negatives" in settings else {}
                off, value = compared(loss, plain, (z, labels, given), 2, 1., **settings, **more)
                case = plain.__name__, settings, V, name, off, value
                worst = max(worst, off)
                assert off <= 5e-6, case         # equal embeddings: gradients that should be 0
    print(f"poor: {worst:.1e}")

def test_poor_batches_are_finite_and_as_the_plain_form(): interpreted(poor_batches)

def blocks_and_shares():
    (z, labels, _), C = random_batch(6, 2, 8, 30, 3, torch.float32), 30
    others, other_labels, _ = random_batch(4500, 1, 8, C, 4, torch.float32)   # a block has 4,096
    keys = others[:, 0], other_labels
    g = torch.Generator().manual_seed(5)
    K = 12 + 4500
    weights = Weights(*(torch.randn(n, generator=g) for n in (K, 12, 12)))
    y = labels.repeat_interleave(2)
    for aligned in (True, False):
        def loss(z, k, method="rows", share=Share()):
            return tiled_loss(z.flatten(0, 1), y, k, keys[1], 0.1, aligned, weights, method, share)
        wanted = loss_and_grads(partial(loss, method="dense"), z.double(), keys[0].double())
        assert error(loss_and_grads(loss, z, keys[0]), wanted) <= 1e-6
        mean = lambda z, k: sum(loss(z, k, share=Share(number, 3)) for number in range(3)) / 3
        with in_tiles(12, K, 5):
            off = error(loss_and_grads(mean, z, keys[0]), wanted)
            assert off <= 2e-6, (aligned, off)         # three means over 4,512 keys: 1.02e-6

def test_several_blocks_and_shares(): interpreted(blocks_and_shares)

def half_precision():
    for dtype in (torch.float16, torch.bfloat16):
        z, labels, centers = random_batch(8, 2, 16, 4, 1, torch.float32)
        z = z.to(dtype)
        first, second, third = by_rows()
        for temperature in (0.1, 0.02):
            f = lambda z: acl_loss(z, labels, centers, temperature)
            wanted = f(z.float().double())
            with first, second, third: found = finite(f, z)
            assert abs(found - wanted.item()) <= 1e-5 * wanted.item()

def test_half_precision(): interpreted(half_precision)

def test_without_a_gpu_nothing_takes_the_kernel():
    from acl_nb.row_kernel import runs_on
    assert "TRITON_INTERPRET" not in os.environ and not runs_on(torch.device("cpu"))
