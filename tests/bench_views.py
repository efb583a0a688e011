"""Speed of the views against PIL, one image at a time, and against kornia's batch. `python tests/bench_views.py`

One thread, processor time, interleaved rounds in one process, medians of the ratios of each round.
Needs nothing but the package; kornia is compared with where it is installed.
"""
import argparse
import statistics
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms as T

from acl_nb.datasets.decoders import decode
from acl_nb.views import POLICIES, Policy, ViewPipeline
from acl_nb.views.ops import compile_operations
from benching import Rows, interleaved, kept, median_ratio

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
PEER = "PIL, published"

def photographs(n, size, seed=0):
    "n random pieces of two photographs, uint8 [n, 3, size, size]."
    rng, photos = np.random.default_rng(seed), load_sample_images().images
    def piece():
        photo, side = photos[rng.integers(2)], int(rng.integers(size, 400))
        top, left = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
        return np.asarray(Image.fromarray(photo[top:top + side, left:left + side]).resize((size, size), Image.BOX))
    return torch.from_numpy(np.stack([piece() for _ in range(n)])).permute(0, 3, 1, 2).contiguous()

class Cutout:
    "A black square, as published: a mask made in numpy, before the normalisation."
    def __call__(self, image):
        mask = np.ones(image.shape[1:], np.float32)
        y, x = np.random.randint(image.shape[1]), np.random.randint(image.shape[2])
        mask[max(0, y - 8):y + 8, max(0, x - 8):x + 8] = 0
        return image * torch.from_numpy(mask)

class LeanAutoAugment:
    "AutoAugment's CIFAR policy by calling PIL directly, as the published repositories do; torchvision's own class is slower."
    def __init__(self):
        self.pairs = T.AutoAugment(T.AutoAugmentPolicy.CIFAR10).policies
        self.scale = {k: v.expand(10).tolist() if v.ndim == 0 else v.tolist() for k, (v, _) in T.AutoAugment()._augmentation_space(10, (32, 32)).items()}

    def __call__(self, image):
        for name, p, m in self.pairs[np.random.randint(25)]:
            if np.random.rand() < p: image = lean(image, name, self.scale[name][m or 0], 1 if np.random.rand() < 0.5 else -1)
        return image

def lean(im, name, m, sign):
    "One operation by PIL; grey where nothing was."
    from PIL import ImageEnhance, ImageOps
    warp = lambda *a: im.transform(im.size, Image.AFFINE, a, fillcolor=(128,) * 3)
    if name in ("Brightness", "Color", "Contrast", "Sharpness"): return getattr(ImageEnhance, name)(im).enhance(1 + sign * m)
    if name == "Posterize": return ImageOps.posterize(im, int(m))
    if name == "Solarize": return ImageOps.solarize(im, m)
    if name in ("AutoContrast", "Equalize", "Invert"): return getattr(ImageOps, name.lower())(im)
    if name == "Rotate": return im.rotate(sign * m, fillcolor=(128,) * 3)
    m = sign * m
    return warp(*{"ShearX": (1, m, 0, 0, 1, 0), "ShearY": (1, 0, 0, m, 1, 0), "TranslateX": (1, 0, int(m), 0, 1, 0), "TranslateY": (1, 0, 0, 0, 1, int(m))}[name])

def published(policy, auto_augment=None):
    "The policy of the published training code, one PIL image at a time."
    end = [T.ToTensor(), T.Normalize(MEAN, STD)]
    if policy == "cifar_regular":
        return T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), auto_augment or LeanAutoAugment(), end[0], Cutout(), end[1]])
    return T.Compose([T.RandomResizedCrop(32, (0.2, 1)), T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2), *end])

def kornia_batch(policy):
    "kornia's batched equivalent, or None. Draws are shared over the batch in places; uint8 to float is part of the work."
    try: import kornia.augmentation as K
    except ImportError: return None
    if policy == "cifar_regular":
        steps = [K.RandomCrop((32, 32), padding=4), K.RandomHorizontalFlip(), K.auto.AutoAugment("cifar10"), K.RandomErasing((0.25, 0.25), (1.0, 1.0), p=1.0)]
    else:
        steps = [K.RandomResizedCrop((32, 32), (0.2, 1)), K.RandomHorizontalFlip(), K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
    run = K.AugmentationSequential(*steps, K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
    return lambda x: run(x.float().div_(255))

def table(title, seconds, images, base, rows):
    "Print and keep milliseconds, views per second, and how many times the views per second of `base`."
    print(f"\n{title}")
    rows.begin(title)
    for case, s in seconds.items():
        middle = statistics.median(s)
        faster = statistics.median(b / a for a, b in zip(s, seconds[base])) * images[case] / images[base]
        rows.add(title, case, "time", 1e3 * middle, "ms")
        rows.add(title, case, "rate", images[case] / middle, "views/s")
        rows.add(title, case, "rate", faster, "×", base)
        print(f"  {case:34}{1e3 * middle:9.1f} ms{images[case] / middle:11,.0f} views/s{faster:8.2f} ×", flush=True)
    rows.write()

def small_images(policy, rounds, rows, B=256):
    x = photographs(B, 32)
    pil = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x]
    one_by_one = lambda transform: lambda: torch.stack([transform(i) for i in pil])
    ours = {v: ViewPipeline(policy, 32, MEAN, STD, views=v) for v in (1, 3, 8)}
    steps = {PEER: one_by_one(published(policy))}
    if policy == "cifar_regular": steps["PIL, torchvision's AutoAugment"] = one_by_one(published(policy, T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)))
    for v, p in ours.items(): steps[f"ours, V = {v}"] = lambda p=p: p(x)
    steps["ours, V = 1, 64 images"] = lambda: ours[1](x[:64])
    if kornia := kornia_batch(policy): steps["kornia, batch"] = lambda: kornia(x)
    images = {k: 64 if "64" in k else B * ours[int(k[-1])].views if k.startswith("ours") else B for k in steps}
    seconds = interleaved(steps, rounds)
    table(f"{policy}, {B} images of 32 × 32", seconds, images, PEER, rows)
    print(f"  V = 8 costs {median_ratio(seconds['ours, V = 8'], seconds['ours, V = 1']):.2f} × V = 1")

def large_images(rounds, rows, B=8, V=3):
    "What a 224-pixel view costs, part by part: decode once, cut V crops, then the steps on the batch."
    files = []
    for photo in load_sample_images().images * (B // 2):
        buffer = BytesIO(); Image.fromarray(photo).resize((500, 375)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    for name in ("imagenet_rand", "imagenet_sim", "imagenet_sim_rand"):
        p = ViewPipeline(name, 224, MEAN, STD, views=V)
        photos = [decode(f) for f in files]
        crops = torch.stack([p.cut(photo, i) for i, photo in enumerate(photos)])
        bare, color = (ViewPipeline(Policy(steps, POLICIES[name].crop), 224, MEAN, STD, views=V) for steps in ({}, {k: f for k, f in POLICIES[name].steps.items() if k in ("jitter", "grey")}))
        seconds = interleaved({"decode": lambda: [decode(f) for f in files], "cut": lambda: [p.cut(photo, i) for i, photo in enumerate(photos)],
                               "all steps": lambda: p(crops), "normalise": lambda: bare(crops), "color": lambda: color(crops)}, rounds)
        ms = {k: 1e3 * statistics.median(s) / B for k, s in seconds.items()}
        whole = ms["decode"] + ms["cut"] + ms["all steps"]
        parts = {"decode": ms["decode"], "crops": ms["cut"], "colour": ms["color"] - ms["normalise"],
                 "other steps": ms["all steps"] - ms["color"], "normalise": ms["normalise"]}
        title = f"{name}, {V} views of 224 × 224"
        rows.begin(title)
        rows.add(title, "all", "time per image", whole, "ms")
        for case, part in parts.items(): rows.add(title, case, "time per image", part, "ms", "all")
        rows.write()
        print(f"{title}: {whole:6.1f} ms an image; " + ", ".join(f"{case} {part / whole:.0%}" for case, part in parts.items()), flush=True)

def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    ask.add_argument("--only", choices=("small", "large"), help="small or large images alone")
    ask.add_argument("--compile", action="store_true", help="with compiled operations (needs a C++ compiler)")
    kept(ask, "views")
    args = ask.parse_args()
    rows = Rows(args.out)
    if args.compile: compile_operations()
    torch.set_num_threads(1); torch.manual_seed(0); np.random.seed(0)
    print(f"torch {torch.__version__}, one thread, uint8 in, normalised float32 out; × is views a second against the first line")
    if args.only != "large":
        for policy in ("cifar_regular", "cifar_sim"): small_images(policy, args.rounds, rows)
    if args.only != "small":
        print("\n224 pixels, photographs of 500 × 375 as JPEG; one decode for all views")
        large_images(max(3, args.rounds // 3), rows)

if __name__ == "__main__": main()
