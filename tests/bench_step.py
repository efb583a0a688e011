"""A whole training step against the encoder alone, and against the published arrangement. `python tests/bench_step.py`

CIFAR images, ResNet-32, 64 images with 3 views, one thread, processor time, interleaved rounds in one process,
medians of the ratios of each round.
"""
import argparse
import statistics
from itertools import cycle

import torch
from PIL import Image

import acl_nb.build
from acl_nb.datasets import ImageArray, LongTailed
from acl_nb.build import build
from acl_nb.probes import Probe
from acl_nb.recipes import recipe
from acl_nb.loop import Training
from bench_views import published
from benching import Rows, interleaved, median_ratio, out_option, processor_name

B, V = 64, 3

def noise(*args, **kwargs):
    "Random pixels in CIFAR's place: a step costs the same."
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10 * B, 3, 32, 32), dtype=torch.uint8, generator=g)
    data = ImageArray(images, torch.arange(10 * B) % 100)
    return LongTailed("noise", data, data, [str(i) for i in range(100)], (0.49, 0.48, 0.45), (0.2, 0.2, 0.2))

def training(**settings):
    acl_nb.build.DATASETS["cifar100_lt"] = noise
    return Training(build(recipe("cifar100_lt", batch_size=B, views=V, epochs=10_000, **settings)))

def whole_step(run):
    "The trainer's own, batch after batch."
    def batches():
        while True:
            yield from run.steps_left()
            run.epoch, run.batch = run.epoch + 1, 0
    steps = batches()
    return lambda: run.train_step(next(steps))

def encoder_alone(run):
    "Forward and backward of the encoder in the same precision and layout."
    layout = torch.channels_last if run.parts.recipe.channels_last else torch.contiguous_format
    x = torch.randn(B * V, 3, 32, 32).contiguous(memory_format=layout)
    encoder = run.parts.bare.encoder.train()
    def step():
        encoder.zero_grad(set_to_none=True)
        with run.parts.half(): y = encoder(x)
        y.float().sum().backward()
    return step

class Published:
    """What published code does: torchvision transforms on one PIL image at a time, float32, channels first;
    the same network, loss and optimiser."""
    def __init__(self):
        self.run = training(precision="fp32", channels_last=False)
        train = self.run.parts.data.train
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in train.images]
        self.labels = train.labels
        self.transforms = [published("cifar_regular")] + [published("cifar_sim")] * (V - 1)
        firsts = range(0, len(self.images), B)
        self.batches = cycle([list(range(first, first + B)) for first in firsts])
        self.run.parts.views = self.views

    def views(self, images, ids, epoch):
        return torch.stack([torch.stack([view(self.images[i]) for view in self.transforms]) for i in ids.tolist()])

    def __call__(self):
        ids = torch.tensor(next(self.batches))
        self.run.train_step([(torch.empty(0, dtype=torch.uint8), self.labels[ids], ids)])     # floats would be views already

def parts_of_a_step(run):
    "What the rest of a step consists of; and one measurement of a probe, which is made in one step of ten."
    p = run.parts
    images, labels, ids = next(iter(p.loader))
    out = p.network(p.views(images, ids, 0))
    grads = [torch.randn_like(q) for q in p.bare.parameters()]
    z, logits = out.z.detach().requires_grad_(), out.logits.detach().requires_grad_()
    leaves = out._replace(z=z, logits=logits, centers=out.centers.detach())
    values = out._replace(z=z.detach(), logits=logits.detach())
    probe = Probe(p.recipe)
    def loss(): p.objective(leaves, labels)[0].backward()
    def update():
        for q, g in zip(p.bare.parameters(), grads): q.grad = g
        p.optimizer.step()
    return {"views": lambda: p.views(images, ids, 0), "loss": loss, "optimiser": update,
            "a probe": lambda: probe.measure(p.objective, values, labels)}

def report(rounds, rows):
    "Measure a step as a CPU user has it and in float32; print, and keep the rows."
    for section, settings in {"a CPU user's defaults": {}, "float32": dict(precision="fp32")}.items():
        run = training(**settings)
        steps = {"encoder alone": encoder_alone(run), "whole step": whole_step(run), "published": Published()}
        seconds = interleaved(steps | parts_of_a_step(training(**settings)), rounds)
        r = run.parts.recipe
        print(f"\n{section}: {run.parts.setup['precision']}, channels {'last' if r.channels_last else 'first'}; "
              f"{B} images, {V} views, {r.encoder}, {r.policy}")
        rows.begin(section)
        for name, s in seconds.items():
            ms = 1e3 * statistics.median(s)
            ratios = {partner: median_ratio(s, seconds[partner]) for partner in ("encoder alone", "published")}
            rows.add(section, name, "time", ms, "ms")
            for partner, ratio in ratios.items(): rows.add(section, name, "time ratio", ratio, "×", partner)
            said = "".join(f"{ratio:8.3f} × {partner}" for partner, ratio in ratios.items())
            print(f"{name:18}{ms:9.1f} ms{said}", flush=True)
        rows.write()

def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    out_option(ask, "step")
    args = ask.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread")
    report(args.rounds, Rows(args.out, processor_name()))

if __name__ == "__main__": main()
