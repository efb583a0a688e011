"""What loading costs one core: images in memory, and photographs in files. `python tests/bench_loading.py`

Processor time, one thread, interleaved rounds in one process, medians of the ratios of each round. The files are the
two photographs that scikit-learn has, at three sizes, with a little noise of a camera; each gives three crops of 224.
"""
import argparse
import statistics
from io import BytesIO
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize

from acl_nb.datasets import ImageArray, ImageFiles
from acl_nb.datasets.decoders import decode
from acl_nb.datasets.files import IMAGENET_MEAN, IMAGENET_STD
from acl_nb.datasets.lists import read_folder
from acl_nb.datasets.packed import pack_images
from acl_nb.loading import EpochBatches, load_batches
from acl_nb.views import Draws, ViewPipeline
from acl_nb.views.crops import CROP_DRAWS, crop_boxes, crop_image
from benching import Rows, interleaved, median_ratio, out_option, processor_name

B, V, S, FILES = 256, 3, 224, 16
SIZES = (500, 375), (800, 600), (1600, 1200)

def in_memory():
    "case -> a function that loads an epoch of images of CIFAR's size; and how many batches that is."
    n = 40 * B
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data, batches = ImageArray(images, torch.arange(n) % 100), EpochBatches(n, B)
    def all_of(loader):
        for batch in loader: pass
    loader = DataLoader(data, batch_sampler=batches, collate_fn=lambda batch: batch)
    return {"DataLoader": lambda: all_of(loader), "gathered": lambda: all_of(load_batches(data, batches))}, len(batches)

def write_photographs(folder, width, height):
    "Sixteen JPEG files as a camera writes them."
    noise = np.random.default_rng(0)
    for i in range(FILES):
        photograph = Image.fromarray(load_sample_images().images[i % 2])
        photograph = photograph.resize((width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(photograph) + noise.normal(0, 4, (height, width, 3))
        path = folder/f"class_{i % 2}"/f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)

def boxes_of(pipeline, i, epoch, whole):
    "[top, left, height, width] of each view, as `ViewPipeline.cut` draws it."
    draw = Draws(torch.full((V,), i), pipeline.seed, epoch, torch.arange(V))
    drawn = zip(pipeline.policies, draw(CROP_DRAWS))
    return [crop_boxes(lambda n, u=u: u[None], *whole, policy.crop)[0].tolist() for policy, u in drawn]

def crops_of(image, boxes, whole):
    "The crops of a smaller image, by the boxes of the whole one."
    rows, columns = image.shape[1] / whole[0], image.shape[2] / whole[1]
    found = []
    for top, left, height, width in boxes:
        box = [round(top * rows), round(left * columns), round(height * rows), round(width * columns)]
        found.append(crop_image(image, box, S))
    return torch.stack(found)

def smallest(boxes):
    "How many times as long as a crop the shortest side of a box is."
    return min(min(height, width) for *_, height, width in boxes) / S

class OneResize(ImageFiles):
    "Tried, and not in the package: the whole image is made smaller once, as far as its boxes allow, then cropped."
    def _image(self, i):
        image = self._load(i)
        whole = image.shape[1:]
        boxes = boxes_of(self.views, i, self.epoch.item(), whole)
        times = max(1, smallest(boxes))
        if times > 1: image = resize(image, [round(side / times) for side in whole], antialias=True)
        return crops_of(image, boxes, whole)

class PartOfItsSize(ImageFiles):
    "Tried, and not in the package: Pillow decodes at 1/2, 1/4 or 1/8 of the size, as far as the boxes allow."
    def _image(self, i):
        data = self.files.read(self.index.path(i))
        picture = Image.open(BytesIO(data))
        whole = picture.height, picture.width
        boxes = boxes_of(self.views, i, self.epoch.item(), whole)
        times = max(n for n in (1, 2, 4, 8) if n <= max(1, smallest(boxes)))
        if times == 1: return crops_of(decode(data), boxes, whole)
        picture.draft("RGB", (picture.width // times, picture.height // times))
        return crops_of(torch.from_numpy(np.array(picture)).permute(2, 0, 1), boxes, whole)

def in_files(folder, width, height):
    "case -> a function that loads every file once, in a new epoch."
    pipeline = ViewPipeline("imagenet_sim", S, IMAGENET_MEAN, IMAGENET_STD, views=V)
    loose, packed = folder/"loose", folder/"packed"
    write_photographs(loose, width, height)
    pack_images("folder_lt", loose, packed)
    index = read_folder(loose)
    files = ImageFiles(index, loose)
    cases = {"decoded whole": files.cut_by(pipeline),
             "one resize for all crops": OneResize(index, loose).cut_by(pipeline),
             "decoded at a part of its size": PartOfItsSize(index, loose).cut_by(pipeline),
             "packed": ImageFiles(index, packed).cut_by(pipeline)}
    def loads(dataset):
        epochs = count()
        def all_files():
            dataset.epoch.fill_(next(epochs))
            dataset.__getitems__(range(FILES))
        return all_files
    return {case: loads(dataset) for case, dataset in cases.items()}

def report(rows, rounds):
    "Measure, print, and keep the rows."
    section = f"images in memory, {B} of 32 × 32"
    rows.begin(section)
    steps, batches = in_memory()
    seconds = interleaved(steps, rounds)
    for case, s in seconds.items():
        ms, ratio = 1e3 * statistics.median(s) / batches, median_ratio(s, seconds["DataLoader"])
        rows.add(section, case, "time", ms, "ms")
        rows.add(section, case, "time ratio", ratio, "×", "DataLoader")
        print(f"{section}: {case:30}{ms:8.3f} ms a batch{ratio:8.2f} × DataLoader", flush=True)
    for width, height in SIZES:
        section = f"JPEG files of {width} × {height}, {V} crops of {S}"
        rows.begin(section)
        with TemporaryDirectory() as folder: seconds = interleaved(in_files(Path(folder), width, height), rounds)
        for case, s in seconds.items():
            speed, ratio = FILES / statistics.median(s), median_ratio(seconds["decoded whole"], s)
            rows.add(section, case, "speed", speed, "images/s")
            rows.add(section, case, "speed ratio", ratio, "×", "decoded whole")
            print(f"{section}: {case:30}{speed:8.0f} images/s{ratio:8.2f} × decoded whole", flush=True)
    rows.write()

def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    out_option(ask, "loading")
    args = ask.parse_args()
    torch.set_num_threads(1)
    report(Rows(args.out, processor_name()), args.rounds)

if __name__ == "__main__": main()
