"""What people's files are like: an ugly tree that trains and says what it did, names of every kind, little data, recipe files of every editor, data sets that are objects."""
import io
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from acl_nb import build
from acl_nb.answers import open_run
from acl_nb.checks import BadInput
from acl_nb.cli import default_folder, resolve
from acl_nb.datasets.decoders import Note
from acl_nb.datasets.objects import dataset_lt
from acl_nb.datasets.own import folder_lt
from acl_nb.inventory import check_data
from acl_nb.recipes import read_recipe, recipe, recipe_from
from acl_nb.records import Run
from acl_nb.settings import Recipe
from acl_nb.trainer import fit
from ranks import program

def picture(k, size=(12, 10)):
    "A small picture, told by `k`."
    noise = np.random.default_rng(k).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)

def put(path, data=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path

def saved(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path

SMALL = dict(size=8, encoder="resnet8_tiny", policy="plain", batch_size=64, epochs=1, dim=8, hidden=8, on_error="skip")

def train(args, cwd, **more):
    "The command, in a process of its own."
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder)/"acl_train"
        script.write_text("from acl_nb.cli import acl_train\nif __name__ == '__main__': acl_train()\n")
        return program(script, *args, cwd=cwd, **more)

def settings(**more): return [arg for field, value in (SMALL | more).items() for arg in ("--set", f"{field}={value}")]

@pytest.fixture(scope="module")
def ugly(tmp_path_factory):
    "60 classes, 3,000 images of every kind, and everything that lies between them on real disks."
    root, many = tmp_path_factory.mktemp("ugly")/"my data", 50
    endings = ["jpg", "JPG", "jpeg", "png", "bmp", "tif", "gif", "webp", "jfif", "PNG"]
    deep = Image.fromarray(np.linspace(0, 65_535, 120).astype(np.uint16).reshape(10, 12))
    lying, moving = Image.Exif(), {"save_all": True, "append_images": [picture(1)]}
    lying[274] = 6
    for c in range(60):
        folder = root/"TRAIN"/f"class {c:02} é"
        for i in range(many):
            ending, k = endings[i % len(endings)], c * many + i
            kind = {"jfif": "JPEG"}.get(ending)
            path = folder/("deep/er" if i % 7 == 0 else "")/f"image {i}.{ending}"
            if i == 3: saved(path, deep)
            elif i == 7: saved(path, picture(k), save_all=True, append_images=[picture(k + 1)])
            elif i == 13: saved(path, Image.merge("RGBA", [*picture(k).split(), Image.new("L", (12, 10), 99)]))
            elif i == 11: saved(path, picture(k), exif=lying)
            elif i == 20: put(path, saved(folder/"x.jpg", picture(k)).read_bytes()[:-20]) and (folder/"x.jpg").unlink()
            elif i == 30: put(path, b"<html>404</html>")
            else: saved(path, picture(k), format=kind)
        for i in range(2): saved(root/"Validation"/folder.name/f"{i}.png", picture(10_000 + 2 * c + i))
        put(folder/"._image 0.jpg", b"\x00\x05\x16\x07")
        put(folder/".DS_Store"), put(folder/"Thumbs.db")
        put(folder/"@eaDir/image 0.jpg/SYNOPHOTO_THUMB_M.jpg", b"x"), put(folder/".ipynb_checkpoints/image 0-checkpoint.jpg", b"x")
        put(folder/"photo.heic"), put(folder/"notes.txt")
    put(root/"TRAIN/__MACOSX/class/._x.jpg"), put(root/"README.md"), put(root/"TRAIN/lost.jpg")
    (root/"TRAIN/class 05 é/up").symlink_to(root)
    return root

def test_an_ugly_tree_trains_and_its_report_says_what_was_done(ugly, tmp_path):
    args = ["digits_lt", "--data", str(ugly), "--out", "run", "--workers", "1"]
    done = train([*args, *settings(dataset="folder_lt", imbalance="as_is", split="val")], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    run = Run(tmp_path/"run")
    assert run.env["data"]["train"] == 3000 and run.env["data"]["test"] == 120 and run.env["data"]["classes"] == 60
    assert run.env["data"]["left_out"] == {".heic": 60, ".txt": 60, "images in no class": 1}
    met, skipped = run.summary["images"], run.summary["skipped"]
    # 3,000 images are 46 batches of 64: those of the last, partial batch are not met in the one epoch
    assert 100 <= met["unreadable"] <= 120 and 50 <= met["deep"] <= 60 and 50 <= met["animated"] <= 60
    assert 50 <= met["transparent"] <= 60 and 50 <= met["turned"] <= 60 and len(skipped) == 100
    assert all(Path(name).stem in ("image 20", "image 30") for name in skipped)
    line = next(line for line in done.stdout.splitlines() if line.startswith("training images (3,000): "))
    assert f"{met['unreadable']} could not be read and were skipped (TRAIN/class " in line and "60 .heic" in line
    page = (tmp_path/"run/report.html").read_text(encoding="utf-8")
    assert "Images that were skipped" in page and "were skipped (TRAIN/class" in page and "60 .heic" in page

def test_a_class_without_a_readable_image_ends_the_run_by_name(tmp_path):
    for c in range(3):
        for i in range(6): saved(tmp_path/f"d/c{c}/{i}.png", picture(10 * c + i))
    for i in range(6): put(tmp_path/f"d/train_only/{i}.png", b"no picture")
    for part in ("train", "test"): (tmp_path/"e"/part).mkdir(parents=True)
    for c in ("c0", "c1"): (tmp_path/"e/train"/c).symlink_to(tmp_path/"d"/c), (tmp_path/"e/test"/c).symlink_to(tmp_path/"d"/c)
    (tmp_path/"e/train/lost").symlink_to(tmp_path/"d/train_only"), (tmp_path/"e/test/lost").symlink_to(tmp_path/"d/c2")
    mine = recipe("digits_lt", dataset="folder_lt", imbalance="as_is", data=str(tmp_path/"e"), **SMALL | {"batch_size": 2})
    with pytest.raises(BadInput, match="every class must have at least one readable image; got none of lost"):
        fit(mine, tmp_path/"run", quiet=True, workers=0)

def test_a_batch_of_broken_images_does_not_end_the_run(tmp_path):
    for c in range(2):
        for i in range(8): saved(tmp_path/f"d/train/c{c}/{i}.png", picture(10 * c + i))
        for i in range(8, 16): put(tmp_path/f"d/train/c{c}/{i}.png", b"no picture")
        for i in range(2): saved(tmp_path/f"d/test/c{c}/{i}.png", picture(50 + 10 * c + i))
    mine = recipe("digits_lt", dataset="folder_lt", imbalance="as_is", data=str(tmp_path/"d"), **SMALL | {"batch_size": 2, "epochs": 2})
    run = fit(mine, tmp_path/"run", quiet=True, workers=0)
    assert run.summary["images"] == {"unreadable": 16} and len(run.summary["skipped"]) == 16

NAMES = {"blanks": "a  b", "Japanese": "猫", "quotes": "it's \"a\" <b>", "long": "n" * 200, "not UTF-8": os.fsdecode(b"caf\xe9"), "percent": "100%", "hash": "#1"}

def test_names_of_every_kind_survive_to_the_report_and_the_resume(tmp_path):
    root = tmp_path/"d"
    for k, name in enumerate(NAMES.values()):
        for i in range(8): saved(root/name/f"{name} {i}.png", picture(20 * k + i))
        put(root/name/f"{name} broken.png", b"no picture")
    mine = recipe("digits_lt", dataset="folder_lt", imbalance="as_is", data=str(root), **SMALL | {"batch_size": 8, "epochs": 2})
    seed = next(s for s in range(50) if not any(b"broken" in p for p in folder_lt(root, seed=s).test.index.paths))
    mine = replace(mine, subset_seed=seed)
    class Stop:
        def after_epoch(self, run):
            if run.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(mine, tmp_path/"run", quiet=True, workers=0, callbacks=[Stop()])
    run = fit(mine, tmp_path/"run", quiet=True, workers=0)
    assert run.summary["images"] == {"unreadable": len(NAMES)}
    assert {name.split("/")[0] for name in run.summary["skipped"]} == {*NAMES.values()}
    assert sorted(run.env["data"]["class_names"]) == sorted(NAMES.values())
    page = (tmp_path/"run/report.html").read_bytes().decode("utf-8")
    assert "猫" in page and "caf\\udce9" in page

def test_home_is_expanded_wherever_a_path_is_taken(tmp_path):
    home = tmp_path/"home"
    for c in range(2):
        for i in range(6): saved(home/f"pictures/c{c}/{i}.png", picture(10 * c + i))
    mine = dict(dataset="folder_lt", imbalance="as_is", data="~/pictures", **SMALL | {"batch_size": 4})
    put(home/"mine.json", json.dumps(mine).encode())
    done = train(["--recipe=~/mine.json", "--out=$HOME/runs/a", "--workers=0"], tmp_path, HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert Run(home/"runs/a").finished and [p.name for p in tmp_path.iterdir()] == ["home"]

def test_home_is_expanded_where_files_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for c in range(2): saved(tmp_path/f"pictures/c{c}/1.png", picture(c)), saved(tmp_path/f"pictures/c{c}/2.png", picture(c + 2))
    lines = list(check_data("folder_lt", "~/pictures", decode=True))
    assert any("2 classes" in line for line in lines)

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_file_of_any_editor(tmp_path, encoding):
    text = json.dumps({"dataset": "digits_lt", "epochs": 3}).replace(", ", ",\r\n")
    put(tmp_path/"mine.json", text.encode(encoding))
    assert read_recipe(tmp_path/"mine.json").epochs == 3

def test_the_name_of_a_folder_fits_a_file_system():
    usual = recipe("digits_lt")
    many = dict(lr=.123456789, weight_decay=.000123456789, temperature=.123456789, momentum=.87654321, warmup=.0123456789, weight=.123456789,
                tau=1.23456789, dim=77, hidden=99, epochs=1234, batch_size=55, views=3, seed=12345, imbalance=12.3456789, n_max=111, encoder="resnet8_tiny")
    name = default_folder(recipe("digits_lt", **many), usual).name
    assert len(name.encode()) <= 200 and name.startswith("digits_lt") and name == default_folder(recipe("digits_lt", **many), usual).name
    assert name != default_folder(recipe("digits_lt", **many | {"dim": 78}), usual).name

LITTLE = {
    "one class": ({"a": 6}, {}, "a data set must have at least two classes; got one, a"),
    "one image of each class": ({"a": 1, "b": 1}, {}, "a class must have at least two images, one of them to test on"),
    "one image at a time": ({"a": 4, "b": 4}, {"batch_size": 1}, "`batch_size` must be at least 2"),
    "a last batch of one": ({"a": 4, "b": 4, "c": 3}, {"batch_size": 4}, None),
    "two images": ({"a": 2, "b": 2}, {"batch_size": 64}, None),
}

@pytest.mark.parametrize("case", LITTLE)
def test_little_data_trains_or_is_one_sentence(case, tmp_path):
    counts, more, said = LITTLE[case]
    for c, n in counts.items():
        for i in range(n): saved(tmp_path/f"d/{c}/{i}.png", picture(100 * ord(c) + i))
    mine = dict(dataset="folder_lt", imbalance="as_is", data=str(tmp_path/"d"), **SMALL | more)
    def go(): return fit(recipe("digits_lt", **mine), tmp_path/"run", quiet=True, workers=0)
    if said is None: assert go().finished
    else:
        with pytest.raises(BadInput) as refused: go()
        assert said in str(refused.value) and not (tmp_path/"run").exists()

def test_a_process_that_would_see_one_view_is_refused(monkeypatch):
    monkeypatch.setattr(build, "world_size", lambda: 2)
    one_view = recipe("digits_lt", loss="la", views=1, batch_size=2)
    with pytest.raises(BadInput, match="a process's batch must hold at least two views, for its batch statistics; got 1"):
        build.build(one_view, SimpleNamespace(device=torch.device("cpu"), is_local_main_process=True))

def shares(predictions, counts):
    "Accuracies, counted one image at a time: over all images, over classes, and over the classes of each group."
    right, total = [0] * len(counts), [0] * len(counts)
    for label, said in zip(predictions["labels"].tolist(), predictions["predicted"].tolist()):
        total[label] += 1
        right[label] += label == said
    of_class = {c: right[c] / n for c, n in enumerate(total) if n}
    groups = {"many": [c for c in of_class if counts[c] > 100], "few": [c for c in of_class if counts[c] < 20],
              "medium": [c for c in of_class if 20 <= counts[c] <= 100], "mean_class": list(of_class)}
    found = {name: sum(of_class[c] for c in members) / len(members) for name, members in groups.items() if members}
    images = {name: sum(total[c] for c in members) for name, members in groups.items()}
    return found | {"top1": sum(right) / sum(total)}, images | {"top1": sum(total)}

SAID_AS = {"top1": "all images", "mean_class": "mean over classes", "many": "many", "medium": "medium", "few": "few"}

def test_terminal_report_and_files_say_the_same_of_a_test_set_that_is_not_balanced(tmp_path):
    for part, sizes in {"train": (130, 40, 5), "test": (30, 12, 4)}.items():
        for c, n in zip("abc", sizes):
            for i in range(n): saved(tmp_path/f"d/{part}/{c}/{i}.png", picture(100 * ord(c) + i).point(lambda v: v // (ord(c) - 95)))
    done = train(["digits_lt", "--data", "d", "--out", "run", "--workers", "0", *settings(dataset="folder_lt", batch_size=8)], tmp_path)
    run = Run(tmp_path/"run")
    first, last = done.stdout.splitlines()[0], done.stdout.splitlines()[-2]
    assert first == ("folder_lt: 175 images of 3 classes, 130 to 5, imbalance 26; tested on 46, split test, "
                     "4 to 30 of a class: not balanced (many 30, medium 12, few 4)")
    assert "split test, 4 to 30 of a class: not balanced" in last
    by_hand, images = shares(run.predictions, [130, 40, 5])
    assert by_hand["top1"] != by_hand["mean_class"]
    page = (tmp_path/"run/report.html").read_text()
    for name, value in by_hand.items():
        assert run.summary[name] == pytest.approx(value) == run.history[-1][name]
        assert run.summary["tested"][name] == images[name]
        low, high = (100 * bound for bound in run.summary["intervals"][name])
        behind = f"{low:.1f}–{high:.1f}, {images[name]} images"
        assert f"{SAID_AS[name]} {value:.1%} ({behind})" in last
        shot = "-shot" if name in ("many", "medium", "few") else ""
        assert f"<b>{value:.1%}</b>{SAID_AS[name]}{shot}<small>{behind}</small>" in page

def test_a_folder_is_never_cut_unasked(tmp_path):
    for c, n in {"a": 30, "b": 12, "c": 5}.items():
        for i in range(n): saved(tmp_path/f"d/{c}/{i}.png", picture(i))
    asked = dict(dataset="folder_lt", data=str(tmp_path/"d"))
    (tmp_path/"mine.json").write_text(json.dumps(asked))
    options = [f"{field}={value}" for field, value in asked.items()]
    silent = [Recipe(**asked), recipe("digits_lt", **asked), recipe("emoji_lt", **asked), recipe_from(asked, "mine"),
              read_recipe(tmp_path/"mine.json"), resolve("cifar10_lt", pairs=options)[0], resolve(file=tmp_path/"mine.json")[0]]
    assert [build.build_data(r).counts.tolist() for r in silent] == [[24, 10, 4]] * len(silent)
    assert resolve("digits_lt", options={"imbalance": "2"}, pairs=options)[0].imbalance == 2.0

def test_other_images_than_a_runs_are_refused(tmp_path):
    for c in "ab":
        for i in range(6): saved(tmp_path/f"d/{c}/{i}.png", picture(100 * ord(c) + i))
    shutil.copytree(tmp_path/"d", tmp_path/"moved")
    fit(recipe("digits_lt", dataset="folder_lt", data=str(tmp_path/"d"), **SMALL | {"batch_size": 4}), tmp_path/"run", quiet=True, workers=0)
    open_run(tmp_path/"run", tmp_path/"moved")
    saved(tmp_path/"moved/a/0.png", picture(7, size=(20, 20)))
    with pytest.raises(BadInput, match="on the images it was trained with; got files of other sizes"):
        open_run(tmp_path/"run", tmp_path/"moved")

# ---- data sets that are objects

def rows(**columns):
    "A list of rows."
    return [dict(zip(columns, values)) for values in zip(*columns.values())]

def turned():
    "A photograph of a camera that was turned by a quarter, as `ImageFolder` hands it over."
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = 6
    picture(0).save(file, "JPEG", exif=exif)
    return Image.open(file)

DEEP = np.linspace(0, 65_535, 20).astype(np.uint16).reshape(4, 5)
KINDS = {
    "I;16": (Image.fromarray(DEEP), Note.DEEP), "P": (picture(0).quantize(9), Note(0)), "1": (picture(0).convert("1"), Note(0)),
    "LA": (Image.new("LA", (5, 4), (0, 0)), Note.TRANSPARENT), "CMYK": (picture(0).convert("CMYK"), Note(0)),
    "array [H, W, 3]": (np.asarray(picture(0)), Note(0)), "array [H, W]": (np.asarray(picture(0).convert("L")), Note(0)),
    "turned": (turned(), Note.TURNED), "array of 16 bits": (DEEP, Note.DEEP), "tensor": (torch.zeros(3, 4, 5, dtype=torch.uint8), Note(0)),
}

@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_of_an_object(kind):
    data = dataset_lt(rows(img=[KINDS[kind][0]] * 8, label=[0, 1] * 4), share=.25)
    images, labels, _ = data.train.__getitems__(range(len(data.train)))
    assert images.dtype == torch.uint8 and images.shape[1] == 3 and set(labels.tolist()) == {0, 1}
    assert data.train.notes.unique().tolist() == [int(KINDS[kind][1])]
    if kind in ("I;16", "array of 16 bits"): assert len(images.unique()) == 20           # not clipped to two levels

REFUSED = {"float tensor": (torch.rand(3, 4, 4), "views and normalisation come later); got torch.float32 [3, 4, 4]"),
           "float array": (np.random.rand(4, 4, 3), "got float64 [4, 4, 3]"), "I": (Image.new("I", (4, 4)), "got whole numbers of 32 bits"),
           "F": (Image.new("F", (4, 4)), "got floats"), "a path": ("a.jpg", "got str")}

@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_picture_is_refused_by_its_position(kind):
    picture, said = REFUSED[kind]
    data = dataset_lt(rows(img=[picture] * 8, label=[0, 1] * 4), share=.25, size=4)
    with pytest.raises(BadInput, match="item [0-9] must be a ") as refused: data.train.__getitems__([0, 1])
    assert said in str(refused.value)

def test_the_real_library_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["a", "b"]), "coarse_label": datasets.Value("int64")})
    pictures = [Image.fromarray(DEEP) if i % 4 == 0 else picture(i) for i in range(12)]
    hub = datasets.Dataset.from_dict({"img": pictures, "fine_label": [0, 1] * 6, "coarse_label": [0] * 12}, features=features)
    data = dataset_lt(hub, share=.25, size=4)
    assert data.classes == ["a", "b"] and data.counts.tolist() == [4, 4]
    images, _, _ = data.train.__getitems__(range(len(data.train)))
    assert images.shape[1:] == (3, 4, 4) and data.train.counted().get("deep", 0) >= 1
    with pytest.raises(BadInput, match="must have a length and items by position"): dataset_lt(hub.to_iterable_dataset())
