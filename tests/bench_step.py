"""A whole training step against the encoder alone, and against the published arrangement. `python tests/bench_step.py`

CIFAR images, ResNet-32, 64 images with 3 views, one thread, processor time, interleaved rounds in one process, medians of the ratios of each round.
"""
import argparse
import statistics
from itertools import cycle

import torch
from PIL import Image

import acl_nb.parts
from acl_nb.datasets import ImageArray, LongTailed
from acl_nb.parts import Parts
from acl_nb.probes import Probe
from acl_nb.recipes import recipe
from acl_nb.trainer import Training
from benching import Rows, interleaved, kept, median_ratio
from bench_views import published

B, V = 64, 3

def noise(*args, **kwargs):
    "Random pixels in CIFAR's place: a step costs the same."
    images = torch.randint(0, 256, (10 * B, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageArray(images, torch.arange(10 * B) % 100)
    return LongTailed("noise", data, data, [str(i) for i in range(100)], (0.49, 0.48, 0.45), (0.2, 0.2, 0.2))

def training(**settings):
    acl_nb.parts.DATASETS["cifar100_lt"] = noise
    return Training(Parts(recipe("cifar100_lt", batch_size=B, views=V, epochs=10_000, **settings)))

def whole_step(run):
    "The trainer's own, batch after batch."
    def batches():
        while True:
            yield from run.to_come()
            run.epoch, run.batch = run.epoch + 1, 0
    steps = batches()
    return lambda: run.train_step(next(steps))

def encoder_alone(run):
    "Forward and backward of the encoder in the same precision and layout."
    layout = torch.channels_last if run.parts.recipe.channels_last else torch.contiguous_format
    x, encoder = torch.randn(B * V, 3, 32, 32).contiguous(memory_format=layout), run.parts.bare.encoder.train()
    def step():
        encoder.zero_grad(set_to_none=True)
        with run.parts.half(): y = encoder(x)
        y.float().sum().backward()
    return step

class Published:
    "What published code does: torchvision transforms on one PIL image at a time, float32, channels first; the same network, loss and optimiser."
    def __init__(self):
        self.run = training(precision="fp32", channels_last=False)
        data = self.run.parts.data
        self.images, self.labels = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in data.train.images], data.train.labels
        regular, sim = (published(policy) for policy in ("cifar_regular", "cifar_sim"))
        self.batches = cycle([list(range(first, first + B)) for first in range(0, len(self.images), B)])
        self.run.parts.views = lambda images, ids, epoch: torch.stack([torch.stack([view(self.images[i]) for view in [regular] + [sim] * (V - 1)]) for i in ids.tolist()])

    def __call__(self):
        ids = torch.tensor(next(self.batches))
        self.run.train_step([(torch.empty(0), self.labels[ids], ids)])

def parts_of_a_step(run):
    "What the rest of a step consists of; and one measurement of a probe, which is made in one step of ten."
    p = run.parts
    images, labels, ids = next(iter(p.loader))
    out, grads = p.network(p.views(images, ids, 0)), [torch.randn_like(q) for q in p.bare.parameters()]
    z, logits = out.z.detach().requires_grad_(), out.logits.detach().requires_grad_()
    def loss(): p.objective(out._replace(z=z, logits=logits, centers=out.centers.detach()), labels)[0].backward()
    probe = Probe(p.recipe)
    def update():
        for q, g in zip(p.bare.parameters(), grads): q.grad = g
        p.optimizer.step()
    return {"views": lambda: p.views(images, ids, 0), "loss": loss, "optimiser": update, "a probe": lambda: probe.measure(p.objective, out._replace(z=z.detach(), logits=logits.detach()), labels)}

def report(rounds, rows):
    "Print and keep the figures of both settings."
    for name, settings in {"a CPU user's defaults": {}, "float32": dict(precision="fp32")}.items():
        run = training(**settings)
        whole = {"encoder alone": encoder_alone(run), "whole step": whole_step(run), "published": Published()}
        steps = whole | parts_of_a_step(training(**settings))
        seconds = interleaved(steps, rounds)
        r = run.parts.recipe
        layout = "last" if r.channels_last else "first"
        print(f"\n{name}: {run.parts.setup['precision']}, channels {layout}; {B} images, {V} views, {r.encoder}, {r.policy}")
        rows.begin(name)
        for case, s in seconds.items():
            ms = 1e3 * statistics.median(s)
            encoder, published = (median_ratio(s, seconds[partner]) for partner in ("encoder alone", "published"))
            rows.add(name, case, "time", ms, "ms")
            rows.add(name, case, "time", encoder, "×", "encoder alone")
            rows.add(name, case, "time", published, "×", "published")
            print(f"{case:18}{ms:9.1f} ms{encoder:8.3f} × encoder alone{published:8.3f} × published")
        rows.write()

def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    kept(ask, "step")
    args = ask.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread")
    report(args.rounds, Rows(args.out))

if __name__ == "__main__": main()
