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

TRAIN = str(Path(sys.executable).parent/"acl_train")
QUICK = ["--epochs", "2", "--views", "2", "--set", "n_max=20", "imbalance=4", "dim=8", "hidden=8"]
FASHION = Path("/usr/share/datasets/fashion-mnist")

def acl_train(*args, cwd): return subprocess.run([TRAIN, *map(str, args)], cwd=cwd, capture_output=True, text=True)

def in_process(args, monkeypatch, capsys):
    "(exit code, stderr) of the installed script, run in this process: a fresh one needs seconds to import torch."
    monkeypatch.setattr(sys, "argv", [TRAIN, *args])
    with pytest.raises(SystemExit) as exit: runpy.run_path(TRAIN, run_name="__main__")
    return exit.value.code, capsys.readouterr().err

def history(folder): return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in open(folder/"history.jsonl")]

BAD = {
    "unknown recipe": (["digts_lt"], "did you mean digits_lt or glyphs_lt?"),
    "unknown field": (["--set", "temprature=1"], "unknown field 'temprature': did you mean temperature"),
    "no pair": (["--set", "lr"], "--set takes field=value; got lr"),
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

def test_a_fresh_process_ends_with_2_and_no_traceback(tmp_path):
    r = acl_train("digts_lt", cwd=tmp_path)
    assert (r.returncode, r.stderr, r.stdout) == (2, "error: unknown recipe 'digts_lt': did you mean digits_lt or glyphs_lt?\n", "")

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
    assert sorted(os.listdir(tmp_path/"a")) == ["checkpoint", "env.json", "history.jsonl", "model.safetensors", "predictions.npz", "recipe.json", "report.html", "summary.json"]
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
