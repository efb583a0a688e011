"""How many operations and synchronisations a training step would cost on a GPU, counted on a GPU that is not there.

The numbers named here are bounds: they stand so that nothing creeps back in. Views are counted apart.
"""
import os
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from acl_nb import row_kernel
from acl_nb.build import build
from acl_nb.checks import check_again
from acl_nb.counts import class_counts
from acl_nb.datasets import DATASETS, ImageArray, LongTailed
from acl_nb.loading import EpochBatches, sent_to
from acl_nb.loop import READ_EVERY, Training
from acl_nb.losses import acl_loss, bcl_loss, ce_loss, class_balanced_loss, dscl_loss, gala_loss, gcl_loss
from acl_nb.losses import gpaco_loss, ldam_loss, logit_adjusted_loss, paco_loss, proco_loss, scl_loss
from acl_nb.processes import Share
from acl_nb.recipes import recipe
from acl_nb.testing import PretendGPU, loss_and_grads, relative_error
from acl_nb.views import ViewPipeline

STEPS, BATCH, CLASSES = 40, 8, 100
OPERATIONS = {"views": 110, "network": 175, "loss": 90, "backward": 190, "the rest": 30}    # per step, at most
GATHER = 2              # operations per batch of images that lie on the device: the images, the labels

def in_memory(n):
    "Random images in the place of CIFAR-100-LT."
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g)
    data = ImageArray(images, torch.arange(n) % CLASSES)
    return LongTailed("random", data, data, [str(c) for c in range(CLASSES)], (.5,) * 3, (.25,) * 3)

def on_gpu(gpu, r):
    "A recipe's training, on that GPU."
    launcher = SimpleNamespace(device=gpu.device, is_local_main_process=True)
    launcher.prepare_model = lambda network: network
    return Training(build(r, launcher))

def waits_of_steps(gpu, run, most):
    "Synchronisations of each of the first steps."
    found = []
    for batches, _ in zip(run.steps_left(), range(most)):
        found.append(gpu.cost(lambda: run.train_step(batches))[2])
    return found

class Count:
    "Operations and synchronisations by part of the step."
    def __init__(self, gpu): self.gpu, self.operations, self.waits = gpu, Counter(), Counter()

    def of(self, name, f):
        "The function, counted under that name."
        def counted(*args, **settings):
            made, operations, waits = self.gpu.cost(lambda: f(*args, **settings))
            self.operations[name] += operations
            self.waits[name] += waits
            return made
        return counted

    def per_step(self):
        "(operations, synchronisations) of each part."
        for counter in (self.operations, self.waits):
            total = counter.pop("step")
            counter["the rest"] = total - counter.total()
        return {name: (n / STEPS, self.waits[name] / STEPS) for name, n in self.operations.items()}

def all_steps(run):
    "Of an epoch, with what makes their batches."
    for batches in run.steps_left(): run.train_step(batches)

def counted_steps(gpu, **settings):
    "Forty steps of CIFAR-100-LT's recipe, small batches: the count does not depend on their size."
    r = recipe("cifar100_lt", precision="fp32", batch_size=BATCH, epochs=1, **settings)
    data = in_memory(STEPS * BATCH)
    with mock.patch.dict(DATASETS, cifar100_lt=lambda *args, **more: data): run = on_gpu(gpu, r)
    count, parts = Count(gpu), run.parts
    parts.network.forward = count.of("network", parts.network.forward)
    parts.objective.forward = count.of("loss", parts.objective.forward)
    check_again()
    gpu.places.clear()
    made, backward = count.of("views", ViewPipeline.__call__), count.of("backward", torch.autograd.backward)
    with mock.patch.object(ViewPipeline, "__call__", made), mock.patch("torch.autograd.backward", backward):
        count.of("step", all_steps)(run)
    assert run.step == STEPS and run.unread == []
    return count.per_step()

def test_a_cifar_step_waits_for_the_gpu_once_in_twenty_steps_beside_its_views():
    with PretendGPU() as gpu: found = counted_steps(gpu)
    for name, (operations, waits) in found.items():
        print(f"{name:9} {operations:7.1f} operations {waits:5.2f} synchronisations")
    beside_views = sum(waits for name, (_, waits) in found.items() if name != "views")
    assert beside_views <= 0.5, gpu.places.most_common(10)
    assert found["views"][1] * STEPS <= 10, gpu.places.most_common(10)      # tables are copied once
    for name, (operations, _) in found.items():
        assert operations <= OPERATIONS[name], (name, operations)

@pytest.mark.parametrize("place, operations", [("auto", GATHER), ("host", 2)])
def test_loading_images_in_memory_never_waits(place, operations):
    data, batches = in_memory(STEPS * BATCH), STEPS
    with mock.patch.dict(DATASETS, cifar100_lt=lambda *args, **more: data), PretendGPU() as gpu:
        run = on_gpu(gpu, recipe("cifar100_lt", precision="fp32", batch_size=BATCH, epochs=1, data_on=place))
        parts = run.parts
        def loaded(): return [sent_to(gpu.device, *batch[:2]) + [batch[2]] for batch in parts.loader]
        found, operated, waits = gpu.cost(loaded)
        assert {t.device.type for images, labels, ids in found for t in (images, labels)} == {"cuda"}
        assert all(ids.device.type == "cpu" for *_, ids in found)            # they feed the draws of the host
        on_host = [[t.cpu() for t in batch] for batch in found]
    assert waits == 0, gpu.places.most_common(10)
    assert operated <= batches * operations + 1                              # the positions of all batches in one copy
    order = EpochBatches(STEPS * BATCH, BATCH, parts.recipe.seed)
    loader = DataLoader(data.train, batch_sampler=order, collate_fn=list)
    for there, here in zip(on_host, loader, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))

LOSSES = {"acl, adjusted": dict(loss="acl", negatives="adjusted"), "scl": dict(loss="scl"), "dscl": dict(loss="dscl"),
          "bcl": dict(loss="bcl"),
          "ce": dict(loss="ce"), "la": dict(loss="la"), "ldam": dict(loss="ldam"), "cb": dict(loss="cb"), "gcl": dict(loss="gcl"), "gala": dict(loss="gala"),
          "proco": dict(loss="proco")}

DIGITS = dict(precision="fp32", batch_size=32, epochs=1)

@pytest.mark.parametrize("settings", [pytest.param(s, id=name) for name, s in LOSSES.items()])
def test_no_loss_waits_after_its_first_step(settings):
    check_again()
    with PretendGPU() as gpu:
        waits = waits_of_steps(gpu, on_gpu(gpu, recipe("digits_lt", **DIGITS, **settings)), READ_EVERY - 1)
    assert len(waits) > 3 and max(waits[1:]) == 0, (waits, gpu.places.most_common(10))

def test_the_switch_makes_every_step_look():
    with mock.patch.dict(os.environ, ACL_NB_CHECKS="always"), PretendGPU() as gpu:
        waits = waits_of_steps(gpu, on_gpu(gpu, recipe("digits_lt", **DIGITS)), 4)
    assert min(waits) > 5, waits

@pytest.mark.parametrize("policy", ["cifar_regular", "cifar_sim", "imagenet_rand", "imagenet_sim_rand"])
def test_the_views_are_those_of_the_cpu(policy):
    images, ids = in_memory(32).train.images, torch.arange(32)
    pipeline = ViewPipeline(policy, 32, (.5,) * 3, (.25,) * 3, views=2)
    with PretendGPU() as gpu: there = pipeline(images.to(gpu.device), ids.to(gpu.device), 3).cpu()
    assert torch.equal(pipeline(images, ids, 3), there)

def unit(*shape):
    g = torch.Generator().manual_seed(sum(shape))
    return F.normalize(torch.randn(*shape, generator=g), dim=-1)

B, V, D, C = 12, 3, 8, 5
LABELS, COUNTS = torch.arange(B) % C, class_counts(C, 50, 10)
COMPILED = {
    "acl, batch": lambda z, centers, logits: acl_loss(z, LABELS, centers),
    "acl, adjusted": lambda z, centers, logits: acl_loss(z, LABELS, centers, 0.1, True, "adjusted", COUNTS),
    "acl, prior as a list": lambda z, centers, logits: acl_loss(z, LABELS, None, 0.1, True, "prior", COUNTS.tolist()),
    "scl": lambda z, centers, logits: scl_loss(z, LABELS),
    "dscl": lambda z, centers, logits: dscl_loss(z, LABELS, centers=centers),
    "bcl": lambda z, centers, logits: bcl_loss(z, LABELS, centers),
    "la": lambda z, centers, logits: logit_adjusted_loss(logits, LABELS, COUNTS),
    "proco": lambda z, centers, logits: proco_loss(z, LABELS, 0.7 * centers.detach(), COUNTS),
    "ce": lambda z, centers, logits: ce_loss(logits, LABELS),
    "cb": lambda z, centers, logits: class_balanced_loss(logits, LABELS, COUNTS),
    "ldam": lambda z, centers, logits: ldam_loss(logits, LABELS, COUNTS, weights=COUNTS),
    "gcl": lambda z, centers, logits: gcl_loss(logits, LABELS, COUNTS, noise=torch.ones(B * V, C) / 3),
    "gala": lambda z, centers, logits: gala_loss(logits, LABELS, COUNTS / 100),
    "gpaco": lambda z, centers, logits: gpaco_loss(z, LABELS, logits, COUNTS, 0.05),
    "paco": lambda z, centers, logits: paco_loss(z[:, 0], z[:, 0], LABELS, LABELS, logits[:, 0], COUNTS, 0.05),
}

SHARE = dict(share=Share(1, 2))
OWN = SHARE["share"].rows(B)
SHARED = {      # of the second of two processes; classes' counts lie where the embeddings do
    "acl": lambda z, y, c, logits, n: acl_loss(z, y, c, 0.1, True, "adjusted", n, **SHARE),
    "scl": lambda z, y, c, logits, n: scl_loss(z, y, centers=c, **SHARE),
    "dscl": lambda z, y, c, logits, n: dscl_loss(z, y, centers=c, **SHARE),
    "bcl": lambda z, y, c, logits, n: bcl_loss(z, y, c, **SHARE),
    "ce": lambda z, y, c, logits, n: ce_loss(logits[OWN], y, **SHARE),
    "la": lambda z, y, c, logits, n: logit_adjusted_loss(logits[OWN], y, n, **SHARE),
    "proco": lambda z, y, c, logits, n: proco_loss(z, y, 0.7 * c, n, **SHARE),
    "ldam": lambda z, y, c, logits, n: ldam_loss(logits[OWN], y, n, weights=n, **SHARE),
    "cb": lambda z, y, c, logits, n: class_balanced_loss(logits[OWN], y, n, **SHARE),
    "gcl": lambda z, y, c, logits, n: gcl_loss(logits[OWN], y, n, **SHARE),
    "gala": lambda z, y, c, logits, n: gala_loss(logits[OWN], y, n / 100, **SHARE),
    "gpaco": lambda z, y, c, logits, n: gpaco_loss(z, y, logits[OWN], n, 0.05, **SHARE),
    "paco": lambda z, y, c, logits, n: paco_loss(z[:, 0], z[:, 0], y, y, logits[OWN, 0], n, 0.05, **SHARE),
}

def on_host(f): return lambda z, centers, logits: f(z, LABELS, centers, logits, COUNTS)

COMPILED |= {f"{name}, a share": on_host(f) for name, f in SHARED.items() if name != "gcl"}    # which draws

@pytest.mark.parametrize("name", SHARED)
def test_a_share_looks_at_values_once(name):
    check_again()
    with PretendGPU() as gpu:
        batch = [t.to(gpu.device) for t in (unit(B, V, D), LABELS, unit(C, D), torch.ones(B, V, C), COUNTS)]
        waits = [gpu.cost(lambda: SHARED[name](*batch))[2] for again in range(3)]
    assert waits[0] > 0 and waits[1:] == [0, 0], (waits, gpu.places.most_common(10))

def test_the_pretended_gpu_never_takes_the_row_kernel():
    z = unit(B, V, D)
    no_kernel = mock.patch("acl_nb.row_kernel.row_tile", side_effect=AssertionError("Triton can't run there"))
    with mock.patch.object(row_kernel, "_is_right_on", lambda device: True), no_kernel:
        assert row_kernel.runs_on(torch.device("cuda"))
        with PretendGPU() as gpu:
            assert not row_kernel.runs_on(gpu.device)
            found = acl_loss(z.to(gpu.device), LABELS.to(gpu.device)).cpu()
    assert relative_error([found], [acl_loss(z, LABELS)]) < 1e-6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("loss", [pytest.param(f, id=name) for name, f in COMPILED.items()])
def test_a_users_step_is_one_graph(loss, backend):
    torch._dynamo.reset()
    leaves = unit(B, V, D), unit(C, D), torch.ones(B, V, C)
    weight = unit(D, D)
    def step(x, centers, logits):
        return loss(F.normalize(x @ weight, dim=-1), F.normalize(centers, dim=-1), logits)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    found, wanted = loss_and_grads(compiled, *leaves), loss_and_grads(step, *leaves)
    assert relative_error(found, wanted) < 1e-6
