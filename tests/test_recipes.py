"Every recipe on a generated stand-in of its data: the real number of classes, shape and list format; its network takes one step."
import gzip
import math
import os
import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

import acl_nb.datasets.glyphs as glyphs
import acl_nb.build
from acl_nb.datasets import BENCHMARKS
from acl_nb.datasets.own import MADE_FROM
from acl_nb.losses import LOSSES
from acl_nb.build import build
from acl_nb.recipes import RECIPES, recipe
from acl_nb.settings import Recipe
from acl_nb.loop import Training

CLASSES = {"digits_lt": 10, "fashion_lt": 10, "glyphs_lt": 89, "cifar10_lt": 10, "cifar100_lt": 100,
           "imagenet_lt": 1000, "places_lt": 365, "inaturalist18": 8142, "imagenet": 1000, "emoji_lt": 98}
SHAPES = {"digits_lt": [1, 8, 8], "fashion_lt": [1, 28, 28], "glyphs_lt": [1, 32, 32], "cifar10_lt": [3, 32, 32], "cifar100_lt": [3, 32, 32]}
PATHS = {"imagenet_lt": ("train/n{0:08}/n{0:08}_{1}.JPEG", "val/n{0:08}/ILSVRC2012_{1}.JPEG"), "places_lt": ("train/scene{0}/{1}.jpg", "val/scene{0}/{1}.jpg"),
         "inaturalist18": ("train_val2018/Aves/{0}/{1}.jpg", "train_val2018/Aves/{0}/val{1}.jpg")}

def fashion(root):
    for part in "train", "t10k":
        for what, array in ("images-idx3", np.random.default_rng(0).integers(0, 256, (80, 28, 28))), ("labels-idx1", np.arange(80) % 10):
            raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype("u1").tobytes()
            (root/f"{part}-{what}-ubyte.gz").write_bytes(gzip.compress(raw))

def cifar(root, base, key, meta):
    "An archive of CIFAR, with few images."
    (root/base.base_folder).mkdir()
    n = 100 if base is CIFAR10 else 400
    for seed, (name, _) in enumerate(base.train_list + base.test_list):
        pixels = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
        (root/base.base_folder/name).write_bytes(pickle.dumps({"data": pixels, key: (np.arange(n) % CLASSES[base.__name__.lower() + "_lt"]).tolist()}))
    (root/base.base_folder/base.meta["filename"]).write_bytes(pickle.dumps({meta: [str(c) for c in range(CLASSES[base.__name__.lower() + "_lt"])]}))

def faces():
    images = np.random.default_rng(0).integers(1, 256, (480, 89, 32, 32), dtype=np.uint8)
    return glyphs.Faces(images, [(f"{i}.ttf", "face", f"{i:040}") for i in range(480)], {}, [f"family {i}" for i in range(480)])

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Folders of all data sets, and what their lists have; every photograph is the same file."
    root, patch = tmp_path_factory.mktemp("data"), pytest.MonkeyPatch()
    fashion(root); cifar(root, CIFAR10, "labels", "label_names"); cifar(root, CIFAR100, "fine_labels", "fine_label_names")
    patch.setattr(glyphs, "cached_faces", lambda *_: faces())
    one = root/"one.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(one)
    def put(path): path.parent.mkdir(parents=True, exist_ok=True); os.link(one, path)
    for name, templates in PATHS.items():
        b, known = BENCHMARKS[name], {}
        for part in b.parts:
            rows = [(templates[part != "train"].format(y, f"{part}{i}"), y) for y in range(b.classes) for i in range(1 + 4 * (part == "train" and y == 0))]
            (root/name).mkdir(exist_ok=True); (root/name/b.file(part)).write_text("".join(f"{path} {y}\n" for path, y in rows))
            known[part] = (len(rows), 1, 5 if part == "train" else 1)
            if part in ("train", "test" if "test" in b.parts else "val"): [put(root/name/path) for path, _ in rows]
        patch.setitem(BENCHMARKS, name, replace(b, parts=known))
    for y in range(1000):
        for part in "train", "val": put(root/"imagenet"/part/f"n{y:08}"/"1.JPEG")
    for y in range(98):
        for part in "train", "test": put(root/"emoji_lt"/part/f"{y:02}"/"1.png")
    (root/"emoji_lt"/MADE_FROM).write_text("{}")
    yield lambda name: root/name if (root/name).is_dir() else root
    patch.undo()

def one_step(r):
    "The run after its first step."
    training = Training(build(r, workers=0))
    training.train_step([next(iter(training.parts.loader))])
    return training

SMALLER = {"digits_lt": {}, **{name: dict(kind="balanced", n_max=4) for name in list(SHAPES)[1:]}}     # arrays have few images here; photographs are made small

DEEPER = [f"imagenet_resnet{depth}" for depth in (101, 152, 200)]      # differ from imagenet_resnet50 in the encoder alone

@pytest.mark.parametrize("name", [name for name in RECIPES if name not in DEEPER])
def test_a_step_of(name, data, monkeypatch):
    fetched = []
    monkeypatch.setattr(acl_nb.build, "load_pretrained", lambda net, encoder, *size: fetched.append(encoder))
    usual = recipe(name)
    r = recipe(name, data=str(data(usual.dataset)), batch_size=4, **SMALLER.get(usual.dataset, dict(size=32)))
    run = one_step(r)
    p, n = run.parts, CLASSES[r.dataset]
    assert (len(p.data.classes), len(p.data.counts), p.bare.settings["n_classes"]) == (n, n, n) and int(p.data.counts.min()) >= 1
    assert list(p.train.shape) == SHAPES.get(r.dataset, [3, 32, 32]) and p.views.views == r.views
    assert all(math.isfinite(v) for v in run.sums.values()) and acl_nb.build.is_finite(p)
    image, label, _ = p.test[0]
    assert p.bare.eval().predict(p.plain(image[None])[:, 0]).shape == (1, n) and 0 <= label < n
    assert fetched == ["resnet152"] * r.pretrained

@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_on_photographs(loss, data):
    r = recipe("imagenet_lt_resnet50_90", loss=loss, encoder="resnet18", data=str(data("imagenet_lt")), batch_size=4, size=32)
    run = one_step(r)
    assert all(math.isfinite(v) for v in run.sums.values()) and r.classifier == ("linear" if loss in ("paco", "gpaco") else "cosine")

def test_what_is_frozen_stays(data, monkeypatch):
    monkeypatch.setattr(acl_nb.build, "load_pretrained", lambda *_: None)
    training = Training(build(recipe("places_lt_resnet152", data=str(data("places_lt")), encoder="resnet18", batch_size=4, size=32), workers=0))
    before = {k: v.clone() for k, v in training.parts.bare.named_parameters()}
    training.train_step([next(iter(training.parts.loader))])
    moved = {k for k, v in training.parts.bare.named_parameters() if not torch.equal(v, before[k])}
    assert {k for k in moved if "conv" in k} == {"encoder.layer4.1.conv1.weight", "encoder.layer4.1.conv2.weight"} and "encoder.bn1.weight" in moved

def test_a_list_of_other_classes_is_refused(data):
    with pytest.raises(ValueError, match="`classes` must be the number of classes in the data, 1000; got 365"):
        build(Recipe(dataset="imagenet_lt", data=str(data("imagenet_lt")), imbalance="as_is", classes=365))
