"""Speed of the views against PIL, one image at a time, and against kornia's batch. `python tests/bench_views.py`

One thread, processor time, interleaved rounds in one process, medians of the ratios of each round.
Needs nothing but the package; kornia is compared with where it is installed.
"""
import argparse
import statistics
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images
from torchvision import transforms as T

from acl_nb.datasets.decoders import decode
from acl_nb.views import POLICIES, Policy, ViewPipeline
from acl_nb.views.crops import crop_batch, crop_boxes
from acl_nb.views.draws import Draws
from acl_nb.views.ops import brightness, color, compile_operations, contrast, hue
from benching import Rows, interleaved, median_ratio, out_option, processor_name

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
    "AutoAugment's CIFAR policy by PIL itself, as in the published repositories; torchvision's own class is slower."
    def __init__(self):
        self.pairs = T.AutoAugment(T.AutoAugmentPolicy.CIFAR10).policies
        space = T.AutoAugment()._augmentation_space(10, (32, 32))
        self.scale = {k: v.expand(10).tolist() if v.ndim == 0 else v.tolist() for k, (v, _) in space.items()}

    def __call__(self, image):
        for name, p, m in self.pairs[np.random.randint(25)]:
            if np.random.rand() >= p: continue
            sign = 1 if np.random.rand() < 0.5 else -1
            image = lean(image, name, self.scale[name][m or 0], sign)
        return image

def lean(im, name, m, sign):
    "One operation by PIL; grey where nothing was."
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return getattr(ImageEnhance, name)(im).enhance(1 + sign * m)
    if name == "Posterize": return ImageOps.posterize(im, int(m))
    if name == "Solarize": return ImageOps.solarize(im, m)
    if name in ("AutoContrast", "Equalize", "Invert"): return getattr(ImageOps, name.lower())(im)
    if name == "Rotate": return im.rotate(sign * m, fillcolor=(128,) * 3)
    m = sign * m
    matrices = {"ShearX": (1, m, 0, 0, 1, 0), "ShearY": (1, 0, 0, m, 1, 0),
                "TranslateX": (1, 0, int(m), 0, 1, 0), "TranslateY": (1, 0, 0, 0, 1, int(m))}
    return im.transform(im.size, Image.AFFINE, matrices[name], fillcolor=(128,) * 3)

def published(policy, auto_augment=None):
    "The policy of the published training code, one PIL image at a time."
    to_tensor, normalize = T.ToTensor(), T.Normalize(MEAN, STD)
    if policy == "cifar_regular":
        return T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), auto_augment or LeanAutoAugment(),
                          to_tensor, Cutout(), normalize])
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    return T.Compose([T.RandomResizedCrop(32, (0.2, 1)), T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2),
                      to_tensor, normalize])

def kornia_batch(policy):
    "kornia's batched equivalent, or None. Some draws are shared over the batch; uint8 to float is part of the work."
    try: import kornia.augmentation as K
    except ImportError: return None
    if policy == "cifar_regular":
        steps = [K.RandomCrop((32, 32), padding=4), K.RandomHorizontalFlip(), K.auto.AutoAugment("cifar10"),
                 K.RandomErasing((0.25, 0.25), (1.0, 1.0), p=1.0)]
    else:
        steps = [K.RandomResizedCrop((32, 32), (0.2, 1)), K.RandomHorizontalFlip(),
                 K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
    run = K.AugmentationSequential(*steps, K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
    return lambda x: run(x.float().div_(255))

def table(section, seconds, views, rows):
    "Print a line and keep the rows of each case; `views` is how many a case makes in one call."
    print(f"\n{section}")
    for name, s in seconds.items():
        median = statistics.median(s)
        ratio = median_ratio(seconds[PEER], s) * views[name] / views[PEER]
        rows.add(section, name, "time", 1e3 * median, "ms")
        rows.add(section, name, "speed", views[name] / median, "views/s")
        rows.add(section, name, "speed ratio", ratio, "×", PEER)
        print(f"  {name:34}{1e3 * median:9.1f} ms{views[name] / median:11,.0f} views/s{ratio:8.2f} ×", flush=True)

def small_images(policy, rounds, rows, B=256):
    x = photographs(B, 32)
    pil = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x]
    def one_by_one(transform): return lambda: torch.stack([transform(i) for i in pil])
    def batched(pipeline, images): return lambda: pipeline(images)
    steps, views = {PEER: one_by_one(published(policy))}, {PEER: B}
    if policy == "cifar_regular":
        slower = "PIL, torchvision's AutoAugment"
        steps[slower] = one_by_one(published(policy, T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)))
        views[slower] = B
    for V in (1, 3, 8):
        steps[f"ours, V = {V}"] = batched(ViewPipeline(policy, 32, MEAN, STD, views=V), x)
        views[f"ours, V = {V}"] = B * V
    steps["ours, V = 1, 64 images"] = batched(ViewPipeline(policy, 32, MEAN, STD, views=1), x[:64])
    views["ours, V = 1, 64 images"] = 64
    if kornia := kornia_batch(policy):
        steps["kornia, batch"] = batched(kornia, x)
        views["kornia, batch"] = B
    seconds = interleaved(steps, rounds)
    section = f"{policy}, {B} images of 32 × 32"
    rows.begin(section)
    table(section, seconds, views, rows)
    ratio = median_ratio(seconds["ours, V = 8"], seconds["ours, V = 1"])
    rows.add(section, "ours, V = 8", "time ratio", ratio, "×", "ours, V = 1")
    print(f"  V = 8 costs {ratio:.2f} × V = 1")

def passes(rounds, rows, n=64, repeats=20):
    "What the operations of cifar_sim take by themselves on a block that fits the cache, beside their alternatives."
    x = photographs(n, 32)
    strength = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 0.2 - 0.1
    boxes = crop_boxes(Draws(torch.arange(n)), 32, 32, (0.2, 1))
    plain = ViewPipeline("plain", 32, MEAN, STD)
    tables = x.flatten(2).flatten(0, 1)[:, :256].contiguous()           # any 256 entries for a channel of an image
    single = {
        "float32 and back": lambda: x.float().to(torch.int16).to(torch.uint8),
        "table of 256 entries": lambda: tables.gather(1, x.view(len(tables), -1).long()),
        "brightness": lambda: brightness(x, strength),
        "contrast": lambda: contrast(x, strength),
        "colour": lambda: color(x, strength),
        "hue": lambda: hue(x, strength),
        "resized crop": lambda: crop_batch(x, boxes, 32),
        "plain view": lambda: plain(x),
    }
    def repeated(f): return lambda: [f() for _ in range(repeats)]
    section = f"single operations, {n} images of 32 pixels"
    rows.begin(section)
    print(f"\n{section}")
    for name, s in interleaved({name: repeated(f) for name, f in single.items()}, rounds).items():
        nanoseconds = 1e9 * statistics.median(s) / (repeats * x.numel())
        rows.add(section, name, "time", nanoseconds, "ns/value")
        print(f"  {name:34}{nanoseconds:9.2f} ns/value", flush=True)

def jpegs(n):
    "n photographs of 500 × 375 as the bytes of JPEG files."
    files = []
    for photo in load_sample_images().images * (n // 2):
        buffer = BytesIO()
        Image.fromarray(photo).resize((500, 375)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files

def pipelines(name, V):
    "The whole policy, its normalisation alone, and its colours alone."
    policy = POLICIES[name]
    colours = {k: f for k, f in policy.steps.items() if k in ("jitter", "grey")}
    parts = [Policy(steps, policy.crop) for steps in ({}, colours)]
    return [ViewPipeline(p, 224, MEAN, STD, views=V) for p in (name, *parts)]

def large_images(rounds, rows, B=8, V=3):
    "What a 224-pixel view costs, part by part: decode once, cut V crops, then the steps on the batch."
    files = jpegs(B)
    photos = [decode(f) for f in files]
    for name in ("imagenet_rand", "imagenet_sim", "imagenet_sim_rand"):
        whole, bare, colour = pipelines(name, V)
        def cut(): return [whole.cut(photo, i) for i, photo in enumerate(photos)]
        crops = torch.stack(cut())
        seconds = interleaved({"decode": lambda: [decode(f) for f in files], "cut": cut,
                               "all steps": lambda: whole(crops), "normalise": lambda: bare(crops),
                               "colour": lambda: colour(crops)}, rounds)
        ms = {k: 1e3 * statistics.median(s) / B for k, s in seconds.items()}
        total = ms["decode"] + ms["cut"] + ms["all steps"]
        parts = {"decode": ms["decode"], "crops": ms["cut"], "colour": ms["colour"] - ms["normalise"],
                 "other steps": ms["all steps"] - ms["colour"], "normalise": ms["normalise"]}
        section = f"{name}, {V} views of an image, 224 × 224"
        rows.begin(section)
        rows.add(section, "all", "time", total, "ms")
        for part, t in parts.items(): rows.add(section, part, "share", 100 * t / total, "%", "all")
        said = ", ".join(f"{part} {t / total:4.0%}" for part, t in parts.items())
        print(f"{name:18} {V} views of an image: {total:6.1f} ms; {said}", flush=True)

def decoding(rounds, rows, B=8):
    "Bytes to pixels: the rules of the package beside torchvision's native operation alone, which had every format before."
    from torchvision.io import ImageReadMode
    native, rgb = torch.ops.image.decode_image, ImageReadMode.RGB.value
    def alone(data): return native(torch.frombuffer(bytearray(data), dtype=torch.uint8), rgb, True)
    for kind in ("JPEG", "PNG"):
        files = jpegs(B) if kind == "JPEG" else [png_of(f) for f in jpegs(B)]
        seconds = interleaved({"decode": lambda: [decode(f, decoder="torchvision") for f in files],
                               "native operation": lambda: [alone(f) for f in files]}, rounds)
        section, ratio = f"decoding, {kind} of 500 × 375", median_ratio(seconds["native operation"], seconds["decode"])
        rows.begin(section)
        for case, s in seconds.items(): rows.add(section, case, "speed", B / statistics.median(s), "images/s")
        rows.add(section, "decode", "speed ratio", ratio, "×", "native operation")
        print(f"{section}: {B / statistics.median(seconds['decode']):.0f} images/s, {ratio:.2f} × the native operation", flush=True)

def png_of(jpeg):
    "The same picture as a PNG file."
    file = BytesIO()
    Image.open(BytesIO(jpeg)).save(file, "PNG")
    return file.getvalue()

def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    ask.add_argument("--only", choices=("small", "passes", "large", "decode"),
                     help="small images, single operations on them, large images or decoding alone")
    ask.add_argument("--compile", action="store_true", help="with compiled operations (needs a C++ compiler)")
    out_option(ask, "views")
    args = ask.parse_args()
    if args.compile: compile_operations()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    rows = Rows(args.out, processor_name())
    print(f"torch {torch.__version__}, one thread, uint8 in, normalised float32 out; "
          "× is views a second against the first line")
    if args.only in (None, "small"):
        for policy in ("cifar_regular", "cifar_sim"): small_images(policy, args.rounds, rows)
    if args.only in (None, "passes"): passes(args.rounds, rows)
    if args.only in (None, "decode"): decoding(args.rounds, rows)
    if args.only in (None, "large"):
        print("\n224 pixels, photographs of 500 × 375 as JPEG; one decode for all views")
        large_images(max(3, args.rounds // 3), rows)
    rows.write()

if __name__ == "__main__": main()
