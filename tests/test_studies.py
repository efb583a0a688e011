"A study with real processes: killed, stopped, gone on with, checked; and what is wrong with a spec."
import json
import os
import signal
import struct
import time
from pathlib import Path

import pytest
import torch

from acl_nb.datasets import digits_lt
from acl_nb.studies.run import acl_study
from acl_nb.studies.run import train_cell
from acl_nb.studies.specs import find_study, load_results, recorded, study_cells
from ranks import LIMIT, finish, start

SPEC = {"question": "Which?", "recipe": "digits_lt", "seeds": [0, 1], "probe": 2, "seed_fields": ["seed", "subset_seed"],
        "base": {"views": 2, "n_max": 20, "imbalance": 4, "dim": 8, "hidden": 8, "batch_size": 16, "epochs": 10},
        "grids": [{"arms": {"ce": {"loss": "ce"}, "scl": {"loss": "scl"}}}]}

def written(folder, name="kept", **changes):
    "A spec as a file."
    (folder/f"{name}.json").write_text(json.dumps({**SPEC, **changes}))
    return folder/f"{name}.json"

def study(*args, **options): acl_study(*map(str, args), **options)
def until(true):
    end = time.time() + LIMIT
    while not true():
        assert time.time() < end
        time.sleep(0.01)

def parent_of(pid):
    try: return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError: return None

def is_server(pid):
    try: return "forkserver" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError: return False

def workers_of(parent):
    "Process numbers: the parent starts a server, which forks its workers."
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if is_server(p.name) and parent_of(parent_of(p.name)) == parent.pid]

def numbers(results): return {key: {k: v for k, v in run.items() if k not in ("seconds", "environment")} for key, run in results.items()}

def test_killed_stopped_and_gone_on_with(tmp_path):
    spec, said, out = written(tmp_path), tmp_path/"said", tmp_path/"runs"
    begin = lambda: start(study_in, tmp_path, spec, out, said=said)
    under_way = lambda: [p for p in out.glob("*/history.jsonl") if not (p.parent/"summary.json").exists()]
    results = lambda: load_results(tmp_path/"results"/"kept.json")

    parent, = begin()                                                 # the parent is killed: so are its workers
    until(lambda: len(under_way()) == 2)
    workers = workers_of(parent); assert len(workers) == 2
    parent.kill(); finish([parent])
    until(lambda: not any(Path(f"/proc/{w}").exists() for w in workers))

    parent, = begin()                                                 # told to end
    until(lambda: len(workers_of(parent)) == 2)
    os.kill(parent.pid, signal.SIGTERM)
    assert finish([parent]) == [143] and "stopped by SIGTERM" in said.read_text()

    parent, = begin()                                                 # a run is done, and two are under way: Ctrl-C
    until(lambda: len(results()) >= 1 and under_way())
    os.kill(parent.pid, signal.SIGINT)
    assert finish([parent]) == [130] and "stopped by SIGINT; the same command goes on from here" in said.read_text()
    first = results(); assert 1 <= len(first) < 4 and list(out.glob("*/checkpoint/*.pt"))

    assert finish(begin()) == [0] and "kept: 4 of 4 cells" in said.read_text()
    cells = study_cells(find_study(spec))
    whole = {key: train_cell(c, tmp_path/"whole"/key.replace("/", "-")) for key, c in cells.items()}
    assert numbers(recorded(find_study(spec))) == numbers(whole)      # as if nothing had happened
    assert not list(out.glob("*/checkpoint")) and said.read_text().count("Traceback") == 0

    text = (tmp_path/"results"/"kept.json").read_text()               # one number is changed: the check finds it
    top1 = f'"top1": {whole["scl/seed=1"]["top1"]}, '; assert text.count(top1)
    (tmp_path/"results"/"kept.json").write_text(text.replace(top1, '"top1": 0.9999, '))
    assert finish(start(study_in, tmp_path, spec, out, {"check": 1, "only": "scl/seed=1"}, said=said)) == [1]
    assert f"scl/seed=1: top1 is 0.9999 in the record, {whole['scl/seed=1']['top1']} now\n" in said.read_text()

def test_a_killed_worker_takes_its_run_along_and_no_other(tmp_path):
    spec, said, out = written(tmp_path), tmp_path/"said", tmp_path/"runs"
    files = lambda name: list(out.glob(f"*/{name}"))
    results = lambda: load_results(tmp_path/"results"/"kept.json")

    parent, = start(study_in, tmp_path, spec, out, said=said)
    until(lambda: len(files("history.jsonl")) >= 2)                   # both are at work, and cells wait
    os.kill(workers_of(parent)[0], signal.SIGKILL)
    assert finish([parent]) == [1] and "its process died" in said.read_text() and "1 runs failed" in said.read_text()
    first = results(); assert len(first) == 3

    assert finish(start(study_in, tmp_path, spec, out, said=said)) == [0] and "kept: 4 of 4 cells" in said.read_text()
    assert len(results()) == 4 and {key: results()[key] for key in first} == first

def study_in(folder, spec, out, options={}):
    os.chdir(folder)
    study(spec, **{"workers": 2, "out": str(out), **options})

def small_fashion(folder):
    "Digits under the names of Fashion-MNIST's files: a small data set with a validation part."
    folder.mkdir()
    digits = digits_lt(imbalance=1, n_max=124)
    for name, part in (("train", digits.train), ("t10k", digits.test)):
        for kind, values in (("images-idx3", part.images[:, 0]), ("labels-idx1", part.labels)):
            header = b"\0\0\x08" + struct.pack(f">B{values.ndim}I", values.ndim, *values.shape)
            (folder/f"{name}-{kind}-ubyte").write_bytes(header + values.to(torch.uint8).numpy().tobytes())
    return folder

AFTER = {"recipe": "fashion_lt", "probe": None, "seeds": [0], "seed_fields": ["seed"],
         "base": {**SPEC["base"], "epochs": 4, "policy": "digits"},
         "grids": [{"arms": {"ce": {"loss": "ce"}, "la": {"loss": "la"}}}]}

def test_what_can_be_made_afterwards_is_recorded_and_checked(tmp_path, capsys):
    out = {"out": str(tmp_path/"runs"), "data": str(small_fashion(tmp_path/"data")), "workers": 1}
    plain, spec = written(tmp_path, "plain", **AFTER), written(tmp_path, "after", **AFTER, after=[0, 1.5])
    study(plain, **out)
    study(spec, status=True)                       # the same recipes, and yet other runs
    assert "plain: 2 of 2 cells" in (said := capsys.readouterr().out) and "after: 0 of 2 cells" in said
    study(spec, **out)
    runs, before = (load_results(tmp_path/f"results/{name}.json") for name in ("after", "plain"))
    for key, run in runs.items():
        adjusted = run["adjusted"]
        assert run["after"] == [0, 1.5] == [found["tau"] for found in adjusted["adjusted"]]
        assert {name: adjusted["adjusted"][0][name] for name in ("top1", "few", "ece")}.items() <= run.items()
        assert {"tuned", "normalised", "normalised_tuned"} < set(adjusted)
        assert len(adjusted["shifted"]["as it is"]) == len(adjusted["shifted"]["moved"]) == 11
        same = {name: run[name] for name in before[key] if name not in ("seconds", "environment")}
        assert same.items() <= before[key].items() and "adjusted" not in before[key]
    study(plain, **out)                            # nor does the study without take those of the one with
    assert load_results(tmp_path/"results/plain.json") == before

    study(spec, check=2, data=out["data"], workers=1)
    assert "equals the record" in capsys.readouterr().out
    text = (tmp_path/"results/after.json").read_text()
    assert text.count('"tau": 1.5, "top1": ') >= 2     # one number is changed: the check finds it
    (tmp_path/"results/after.json").write_text(text.replace('"tau": 1.5, "top1": 0', '"tau": 1.5, "top1": 1'))
    with pytest.raises(SystemExit) as exit: study(spec, check=2, data=out["data"], workers=1)
    assert exit.value.code == 1 and "adjusted is" in capsys.readouterr().err

BAD = {
    "not JSON": ("{", "must be a readable JSON file"),
    "no grids": ({"question": "Which?", "recipe": "digits_lt", "seeds": [0]}, "`grids` must be given"),
    "unknown entry": ({**SPEC, "seed": [0]}, "unknown entry 'seed': did you mean seeds"),
    "unknown recipe": ({**SPEC, "recipe": "digts_lt"}, "unknown recipe 'digts_lt'"),
    "unknown field": ({**SPEC, "base": {"veiws": 2}}, "ce/seed=0: unknown field 'veiws': did you mean views"),
    "no views": ({**SPEC, "grids": [{"arms": {"a": {}}, "axes": {"views": [2, 0]}}], "base": {}}, "a/views=0/seed=0: `views` must be at least 1; got 0"),
    "a field twice": ({**SPEC, "grids": [{"arms": {"a": {"seed": 3}}}]}, "a/seed=0: a field must be set once, by the arm, an axis, the tuning or the seed; got seed"),
    "a tuning that is not there": ({**SPEC, "tuned_by": "nothing"}, "nothing.json must be a readable JSON file"),
    "nothing to tune on": ({**SPEC, "after": [0, 1]}, "ce/seed=0: `after` needs a data set with a validation part, `split` val; got digits_lt"),
    "no such images": ({**SPEC, "base": {"n_max": 5000}}, "ce/seed=0: class 0 must have 5000 images"),
}

@pytest.mark.parametrize("spec, said", BAD.values(), ids=BAD)
def test_a_bad_spec_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, spec, said):
    path = tmp_path/"bad.json"
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit: study(path, workers=1)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1 and said in err
    assert not (tmp_path/"results").exists()

def test_a_name_that_is_no_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for there, said in (False, "nbs/studies must hold studies: run this in the project's folder"), (True, "unknown study 'kep': did you mean kept?"):
        if there: (tmp_path/"nbs/studies").mkdir(parents=True); written(tmp_path/"nbs/studies")
        with pytest.raises(SystemExit) as exit: study("kep", status=True)
        assert exit.value.code == 2 and said in capsys.readouterr().err
    study(status=True, workers=3)
    assert capsys.readouterr().out == "kept: 0 of 4 cells, no time measured\n"
