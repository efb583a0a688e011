"The benches run and keep what they find; nothing here looks at a time."
import json
import os
import subprocess
import sys

import pytest
import torch

from bench_gpu import PACKAGE, SECTIONS, main, sites_of_warnings
from benching import ROOT, Rows

ABOUT = {"commit", "date", "device", "threads", "torch"}
KEYS = ABOUT | {"section", "case", "figure", "value", "unit", "partner"}

def without_gpu(monkeypatch): monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

def test_every_section_works_in_small(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = [sys.executable, str(ROOT/"tests"/"bench_gpu.py"), "--smoke", "--out", str(tmp_path/"gpu.json")]
    done = subprocess.run(script, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path/"gpu.json").read_text())
    assert all(set(row) == KEYS for row in rows)
    assert [row for row in rows if row["figure"] in ("failed", "wrong")] == []
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(SECTIONS)
    assert [row["value"] for row in rows if row["section"] == "syncs"] == ["needs CUDA"]
    errors = [row["value"] for row in rows if row["figure"] == "relative error"]
    assert len(errors) > 100 and 0 < max(errors) <= 1e-4        # 0 throughout: nothing was compared
    partners = {row["partner"] for row in rows if row["figure"] == "time ratio"}
    assert partners and partners <= {row["case"] for row in rows}

def test_without_a_gpu_it_says_what_is_missing(monkeypatch, tmp_path, capsys):
    without_gpu(monkeypatch)
    assert main(["--out", str(tmp_path/"gpu.json")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "no CUDA device" in said.err and "--smoke" in said.err
    assert not (tmp_path/"gpu.json").exists()

def test_an_unknown_section_is_answered_with_those_there_are(tmp_path, capsys):
    assert main(["--smoke", "--only", "loss,speed", "--out", str(tmp_path/"gpu.json")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert all(name in said.err for name in [*SECTIONS, "speed"])

def test_a_section_that_raises_is_a_row_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    def broken(bench): raise ValueError("no memory\nand more")
    without_gpu(monkeypatch)
    monkeypatch.setitem(SECTIONS, "loss", broken)
    monkeypatch.setitem(SECTIONS, "views", lambda bench: bench.add("case", "time", float("nan"), "ms"))
    assert main(["--smoke", "--only", "loss,views", "--out", str(tmp_path/"gpu.json")]) == 1
    rows = json.loads((tmp_path/"gpu.json").read_text())
    found = [(row["section"], row["figure"], row["value"], row["unit"]) for row in rows]
    assert found == [("loss", "failed", "ValueError: no memory", "text"), ("views", "time", "nan", "ms")]
    assert "ValueError: no memory" in capsys.readouterr().out

@pytest.mark.parametrize("is_right, code", [(True, 0), (False, 1)])
def test_a_wrong_result_decides_the_exit_code(monkeypatch, tmp_path, is_right, code):
    made = lambda bench: bench.check("case", "relative error", 0.5, "", is_right)
    monkeypatch.setitem(SECTIONS, "right", made)
    assert main(["--smoke", "--only", "right", "--out", str(tmp_path/"gpu.json")]) == code
    figures = [row["figure"] for row in json.loads((tmp_path/"gpu.json").read_text())]
    assert figures == ["relative error", "wrong"][:1 + code]

def test_a_section_measured_anew_replaces_its_rows_of_this_device_alone(tmp_path):
    def kept(device, section, value):
        rows = Rows(tmp_path/"rows.json")
        rows.about["device"] = device
        rows.begin(section)
        rows.add(section, "case", "time", value, "ms")
        rows.write()
        written = json.loads((tmp_path/"rows.json").read_text())
        return [(row["device"], row["section"], row["value"]) for row in written]
    for args in ("A", "loss", 1), ("B", "loss", 2), ("A", "views", 3): kept(*args)
    assert kept("A", "loss", 4) == [("B", "loss", 2), ("A", "views", 3), ("A", "loss", 4)]

def test_synchronisations_are_counted_where_the_package_makes_them():
    made = ("from warnings import warn\n"
            "def f(): warn('called a synchronizing CUDA operation')\n"
            "def g(): warn('another')\n")
    inside = {}
    exec(compile(made, str(PACKAGE/"made.py"), "exec"), inside)
    def step():
        inside["f"]()
        inside["f"]()
        inside["g"]()
    assert sites_of_warnings(step, "synchronizing CUDA operation") == {"made.py:2 f": 2}
