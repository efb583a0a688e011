"The command line, in its own process: exit codes, one-line errors, run folders, the same run twice."
import gzip
import json
import os
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from acl_nb.recipes import RECIPES
from ranks import program

TRAIN = str(Path(sys.executable).parent/"acl_train")
QUICK = ["--epochs", "2", "--views", "2", "--set", "n_max=20", "imbalance=4", "dim=8", "hidden=8"]
FASHION = Path("/usr/share/datasets/fashion-mnist")

def acl_train(*args, cwd): return program(TRAIN, *args, cwd=cwd)

def in_process(args, monkeypatch, capsys):
    "(exit code, stderr) of the installed script, run in this process: a fresh one needs seconds to import torch."
    monkeypatch.setattr(sys, "argv", [TRAIN, *args])
    with pytest.raises(SystemExit) as exit: runpy.run_path(TRAIN, run_name="__main__")
    return exit.value.code, capsys.readouterr().err

def history(folder): return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in open(folder/"history.jsonl")]

BAD = {
    "unknown recipe": (["digts_lt"], "did you mean digits_lt or glyphs_lt or emoji_lt?"),
    "unknown field": (["--set", "temprature=1"], "unknown field 'temprature': did you mean temperature"),
    "no pair": (["--set", "lr"], "--set takes field=value (--fields lists them); got lr"),
    "imbalance below 1": (["--imbalance", "0.01"], "`imbalance` must be at least 1 (largest count / smallest count); got 0.01"),
    "no views": (["--views", "0"], "`views` must be at least 1; got 0"),
    "text for a number": (["--views", "many"], "`views` must be a whole number; got 'many'"),
    "zero temperature": (["--set", "temperature=0"], "`temperature` must be positive; got 0"),
    "negative temperature": (["--set", "temperature=-0.1"], "`temperature` must be positive; got -0.1"),
    "a class without an image": (["--imbalance", "500"], "every class must keep at least one image; got 0 of 120 at imbalance 500"),
    "more images than there are": (["--set", "n_max=500"], "class 0 must have 500 images to keep; got 128"),
    "a field twice": (["--set", "lr=0.1", "--set", "lr=0.2"], "--set must name a field once; got lr=0.1 lr=0.2"),
    "centres that bcl lacks": (["--loss", "bcl", "--set", "centers=none"], "`centers` must be weights or free; got none"),
    "one view for paco": (["--loss", "paco", "--views", "1"], "`views` must be at least 2; got 1"),
    "a queue that nothing reads": (["--set", "queue=64"], "only paco and gpaco read one; got 64 with acl"),
    "GPUs that are not there": (["--set", "sync_bn=yes"], "`sync_bn` needs GPUs"),
    "unknown schedule": (["--set", "schedule=cosin"], "unknown schedule 'cosin': did you mean cosine?"),
    "unknown loss": (["--loss", "alc"], "unknown loss 'alc'"),
    "unknown resume": (["--resume", "yes"], "`resume` must be auto, never or must; got 'yes'"),
    "nothing to resume": (["--resume", "must"], "must hold a run to resume"),
    "data that is not there": (["fashion_lt", "--data", "nowhere"], "apt-get install dataset-fashion-mnist"),
    "data that is a file": (["cifar100_lt", "--data", "a_file"], "CIFAR100 not found (looked for cifar-100-python/ in a_file)"),
}

@pytest.mark.parametrize("args, said", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, args, said):
    (tmp_path/"a_file").write_text("not a data set")
    monkeypatch.chdir(tmp_path)
    code, err = in_process(args, monkeypatch, capsys)
    assert code == 2 and err.count("\n") == 1 and said in err
    assert os.listdir(tmp_path) == ["a_file"]

GOOD = {"name": "mine", "dataset": "digits_lt", "policy": "digits", "epochs": 2, "n_max": 20, "imbalance": 4, "dim": 8, "hidden": 8}
BAD_FILES = {
    "not JSON": ("{'dataset'", "bad.json must be a readable JSON file: Expecting property name"),
    "empty": ("", "bad.json must be a readable JSON file: Expecting value"),
    "a list": ([1], "bad.json must hold one JSON object, a field of the recipe an entry; got list"),
    "no data set": ({"epochs": 3}, "bad.json: `dataset` must be given, the name of a data set"),
    "unknown data set": ({**GOOD, "dataset": "digts_lt"}, "unknown dataset 'digts_lt': did you mean digits_lt"),
    "unknown field": ({**GOOD, "epoch": 3}, "bad.json: unknown field 'epoch': did you mean epochs"),
    "a field twice": ('{"dataset": "digits_lt", "lr": 1, "lr": 2}', "bad.json: a field must be given once; got lr"),
    "text for a number": ({**GOOD, "lr": "fast"}, "`lr` must be a number; got 'fast'"),
    "a list for text": ({**GOOD, "policy": ["digits"]}, "`policy` must be text; got ['digits']"),
    "an object for a number": ({**GOOD, "views": {}}, "`views` must be a whole number; got {}"),
    "nothing for a number": ({**GOOD, "views": None}, "`views` must be a whole number; got None"),
    "half an epoch": ({**GOOD, "epochs": 1.5}, "`epochs` must be a whole number; got 1.5"),
    "no imbalance": ({**GOOD, "imbalance": "as_is"}, "`imbalance` must be a number: digits_lt is cut to a long tail (1 is balanced); got as_is"),
    "an imbalance of a list": ({"dataset": "imagenet_lt", "imbalance": 100}, "`imbalance` must be as_is and `n_max` unset; got imbalance=100"),
    "no size": ({**GOOD, "size": 0}, "`size` must be at least 1; got 0"),
    "other classes": ({**GOOD, "classes": 12}, "`classes` must be the number of classes in the data, 10; got 12"),
    "data that is not there": ({"dataset": "places_lt", "imbalance": "as_is", "data": "nowhere"}, "Places_LT_train.txt not found in nowhere: `acl_data fetch places_lt --data nowhere`"),
    "an encoder that is not there": ({**GOOD, "encoder": "resnet51"}, "unknown encoder 'resnet51': did you mean resnet50"),
    "no weights to start from": ({**GOOD, "pretrained": True}, "`pretrained` weights are those of torchvision's and timm's encoders; got resnet8"),
    "weights from two places": ({**GOOD, "pretrained": True, "encoder_weights": "a.pth"}, "an encoder starts from one place: `pretrained` or `encoder_weights`; got both"),
    "weights that are not there": ({**GOOD, "encoder_weights": "a.pth"}, "`encoder_weights` must be a file of tensors, a.pth is none that can be read: "),
    "freezing by another word": ({**GOOD, "freeze": "some"}, "unknown freeze 'some': did you mean none?"),
    "a rate of what does not move": ({**GOOD, "freeze": "all", "encoder_lr": 0.1}, "`encoder_lr` must be 1: the encoder is frozen; got 0.1"),
    "corrections without a matrix": ({**GOOD, "lora": 4}, "`lora` is for encoders with linear layers, such as timm's transformers; got resnet8"),
    "paths of another encoder": ({**GOOD, "drop_path": 0.1}, "`drop_path` is for timm's encoders; got resnet8"),
    "statistics of nobody": ({**GOOD, "statistics": "encoder"}, "only torchvision's and timm's encoders have statistics of their own; got resnet8"),
    "an optimiser that is not there": ({**GOOD, "optimizer": "adam"}, "unknown optimizer 'adam': did you mean adamw"),
    "a re-weighting that nothing does": ({**GOOD, "drw": 0.8}, "`drw` must be none: of the losses, only ldam re-weighs; got 0.8 with acl"),
}

@pytest.mark.parametrize("content, said", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_recipe_file_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, content, said):
    (tmp_path/"bad.json").write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.chdir(tmp_path)
    code, err = in_process(["--recipe", "bad.json"], monkeypatch, capsys)
    assert code == 2 and err.count("\n") == 1 and said in err and "Traceback" not in err
    assert os.listdir(tmp_path) == ["bad.json"]

def test_an_encoder_of_timm_without_timm(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.chdir(tmp_path)
    assert in_process(["--set", "encoder=timm/vit_tiny_patch16_224"], monkeypatch, capsys) == (2, "error: an encoder `timm/…` needs timm: pip install 'acl_nb[timm]'\n")

def test_list_and_print_and_back(tmp_path, monkeypatch, capsys):
    assert [line.split()[0] for line in main(["--list"], monkeypatch, capsys).splitlines()] == ["recipe", *RECIPES]
    for name in RECIPES:
        for loss in "acl", "ldam", "gpaco":
            shown = main([name, "--loss", loss, "--print"], monkeypatch, capsys)
            assert json.loads(shown)["loss"] == loss and json.loads(shown)["name"] == name
            (tmp_path/"r.json").write_text(shown)
            assert main(["--recipe", str(tmp_path/"r.json"), "--print"], monkeypatch, capsys) == shown
    assert os.listdir(tmp_path) == ["r.json"]

def main(args, monkeypatch, capsys):
    "What the command prints."
    monkeypatch.setattr(sys, "argv", [TRAIN, *args])
    with pytest.raises(SystemExit) as exit: runpy.run_path(TRAIN, run_name="__main__")
    assert not exit.value.code
    return capsys.readouterr().out

def test_a_recipe_file_trains_and_its_run_can_be_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"mine.json").write_text(json.dumps(GOOD))
    assert "runs/mine-seed=1/report.html" in main(["--recipe", "mine.json", "--seed", "1"], monkeypatch, capsys)
    first = tmp_path/"runs"/"mine-seed=1"
    main(["--recipe", str(first/"recipe.json"), "--out", "again"], monkeypatch, capsys)
    assert history(first) == history(tmp_path/"again") and (first/"recipe.json").read_text() == (tmp_path/"again"/"recipe.json").read_text()
    assert in_process(["digits_lt", "--recipe", "mine.json"], monkeypatch, capsys) == (2, "error: a recipe must be named or read from a file, not both; got digits_lt and mine.json\n")

def test_a_fresh_process_ends_with_2_and_no_traceback(tmp_path):
    r = subprocess.run([TRAIN, "digts_lt"], cwd=tmp_path, capture_output=True, text=True)
    assert (r.returncode, r.stderr, r.stdout) == (2, "error: unknown recipe 'digts_lt': did you mean digits_lt or glyphs_lt or emoji_lt?\n", "")

def test_labels_beyond_the_classes(tmp_path):
    for part in "train", "t10k":
        for what, array in ("images-idx3", np.zeros((20, 28, 28))), ("labels-idx1", np.arange(20) % 12):
            raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype("u1").tobytes()
            (tmp_path/f"{part}-{what}-ubyte.gz").write_bytes(gzip.compress(raw))
    r = acl_train("fashion_lt", "--data", tmp_path, "--out", tmp_path/"run", "--set", "imbalance=1", "n_max=1", cwd=tmp_path)
    assert (r.returncode, r.stderr.count("\n")) == (2, 1) and "must lie in 0..9" in r.stderr
    assert not (tmp_path/"run").exists()

def test_a_run_its_folder_and_its_twin(tmp_path):
    first = acl_train(*QUICK, "--out", "a", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "2/2" in first.stdout and "all classes" in first.stdout and "a/report.html" in first.stdout
    assert sorted(os.listdir(tmp_path/"a")) == ["balance.jsonl.gz", "checkpoint", "env.json", "history.jsonl", "model.safetensors", "predictions.npz", "recipe.json", "report.html", "summary.json"]
    assert acl_train(*QUICK, "--out", "b", cwd=tmp_path).returncode == 0
    assert history(tmp_path/"a") == history(tmp_path/"b")
    again = acl_train(*QUICK, "--out", "a", cwd=tmp_path)
    assert again.returncode == 0 and "finished" in again.stdout
    other = acl_train(*QUICK, "--seed", "1", "--out", "a", cwd=tmp_path)
    assert other.returncode == 2 and "a holds another recipe's run (seed is 0 there, 1 here)" in other.stderr and other.stderr.count("\n") == 1

def test_default_folders_do_not_meet(tmp_path):
    for loss in "ce", "gpaco": assert acl_train(*QUICK, "--loss", loss, "--set", "scale=20", cwd=tmp_path).returncode == 0
    assert sorted(os.listdir(tmp_path/"runs")) == [f"digits_lt-imbalance=4.0-n_max=20.0-views=2-dim=8-hidden=8-scale=20.0-loss={loss}-epochs=2".replace("-scale=20.0-", "-scale=20.0-") for loss in ("ce", "gpaco")]

@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_from_debian(tmp_path):
    r = acl_train("fashion_lt", "--data", FASHION, "--out", "f", "--epochs", "1", "--views", "1", "--set", "n_max=40", "imbalance=10", cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    data = json.loads((tmp_path/"f"/"env.json").read_text())["data"]
    assert data["test"] == 10_000 and data["counts"][0] == 40 and data["class_names"][0] == "T-shirt/top"
