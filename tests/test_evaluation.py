"Probe, evaluation and doctor, in processes of their own: what they print, what they refuse, what they leave untouched."
import json
import runpy
import shutil
import sys

import pytest
import torch
from PIL import Image

from acl_nb.answers import open_run, outputs_of, validation_part
from acl_nb.checkpoints import load_checkpoint
from acl_nb.datasets import digits_lt
from acl_nb.evaluation import acl_eval
from acl_nb.gradients import class_balance, conflict_rate
from acl_nb.metrics import evaluate
from acl_nb.priors import adjust, tune_tau
from acl_nb.probes import Probe, closed_form
from acl_nb.recipes import recipe
from acl_nb.records import Run, append_row
from acl_nb.report import write_report
from acl_nb.settings import Recipe
from acl_nb.trainer import fit
from ranks import finish, program, start

SMALL = dict(views=2, n_max=20, imbalance=4, dim=8, hidden=8, batch_size=16, epochs=2)

def script(command, folder):
    "A console script as pip would make it."
    module = {"acl_eval": "evaluation", "acl_doctor": "doctor"}[command]
    path = folder/command
    path.write_text(f"import sys\nfrom acl_nb.{module} import {command}\nif __name__ == '__main__': sys.exit({command}())\n")
    return str(path)

def started(command, *args, cwd):
    return program(script(command, cwd), *args, cwd=cwd)

class Witness:
    "Keeps what the objective was given in every step."
    def __init__(self): self.seen = []
    def begin(self, run): run.parts.objective.register_forward_pre_hook(lambda objective, args: self.seen.append((objective, args)))

@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    folder, witness, r = tmp_path_factory.mktemp("runs")/"probed", Witness(), recipe("digits_lt", **SMALL)
    return fit(r, folder, quiet=True, callbacks=[witness, Probe(r, 2)]), witness.seen

def plain(run): return [{k: v for k, v in row.items() if k not in ("seconds", "balance")} for row in run.history]
def content(run): return plain(run), (run.path/"model.safetensors").read_bytes()

def test_the_probe_measures_class_balance(probed):
    run, seen = probed
    steps = len(seen) // 2
    for epoch, row in enumerate(run.balance):
        pairs = [closed_form(*seen[i][:1], *seen[i][1]) for i in range(epoch * steps, (epoch + 1) * steps, 2)]
        assert row["balance"]["steps"] == len(pairs) > 2
        for key in ("attraction", "wrong_way", "repulsion"):
            torch.testing.assert_close(torch.tensor(row["balance"][key]), sum(class_balance(p, 10)[key] for p in pairs) / len(pairs), rtol=1e-5, atol=1e-7)
        assert row["balance"]["conflict_rate"] == pytest.approx(sum(map(conflict_rate, pairs)) / len(pairs), rel=1e-5)

@pytest.mark.parametrize("more", [{}, dict(loss="paco", queue=40, accumulate=2)], ids=["acl", "paco"])
def test_the_probe_changes_nothing(tmp_path, more):
    r = recipe("digits_lt", **SMALL, **more)
    on, off = fit(r, tmp_path/"on", quiet=True, callbacks=[Probe(r, 1)]), fit(r, tmp_path/"off", quiet=True)
    assert content(on) == content(off) and all("balance" in row for row in on.history) and not any("balance" in row for row in off.history)

class Trip:
    def after_step(self, run):
        if run.step == 3: raise ZeroDivisionError

def test_a_probed_run_goes_on_in_mid_epoch(tmp_path, probed):
    r = recipe("digits_lt", **SMALL)
    with pytest.raises(ZeroDivisionError): fit(r, tmp_path/"run", quiet=True, save_every=0, callbacks=[Probe(r, 2), Trip()])
    assert load_checkpoint(tmp_path/"run"/"checkpoint").callbacks["Probe"]["steps"] == 1
    run = fit(r, tmp_path/"run", "must", quiet=True, callbacks=[Probe(r, 2)])
    assert content(run) == content(probed[0]) and run.balance == probed[0].balance

def two(out, witness_at):
    from acl_nb.processes import rank
    witness, r = Witness(), recipe("digits_lt", **SMALL)
    fit(r, out, quiet=True, callbacks=[Probe(r, 10**6), witness])
    if rank() == 1: torch.save([seen[1] for seen in witness.seen], witness_at)

def test_two_processes_measure_the_whole_batch(tmp_path, probed):
    group = start(two, tmp_path/"run", tmp_path/"seen", said=tmp_path/"said", world=2)
    assert finish(group) == [0, 0], (tmp_path/"said").read_text()
    out, labels = torch.load(tmp_path/"seen", weights_only=False)[0]
    assert len(labels) == 16
    row = Run(tmp_path/"run").balance[0]["balance"]
    expected = class_balance(closed_form(probed[1][0][0], out, labels), 10)
    for key, values in expected.items(): torch.testing.assert_close(torch.tensor(row[key]), values, rtol=1e-5, atol=1e-7)

def test_eval_reproduces_the_summary(tmp_path, probed):
    run, _ = probed
    r = started("acl_eval", run.path, "--out", "e.json", "e.csv", "e.html", cwd=tmp_path)
    assert (r.returncode, r.stderr) == (0, ""), r.stderr
    assert "summary.json: the same numbers, exactly" in r.stdout and "centre separation" in r.stdout
    scores = json.loads((tmp_path/"e.json").read_text())["scores"]
    assert scores == {k: run.summary[k] for k in scores} and len((tmp_path/"e.csv").read_text().splitlines()) == 501

@pytest.mark.parametrize("file, change, said", [
    ("env", lambda e: {**e, "acl_nb": "9.9"}, "must be of this version, acl_nb"),
    ("recipe", lambda r: {**r, "imbalance": 2.0}, "must be evaluated on the images it was trained with"),
    ("recipe", lambda r: {**r, "colour": 1}, "must have the fields of this version's recipes, no more and no fewer; got colour"),
    ("summary", None, "a run folder must hold recipe.json"),
    ("a file", None, "a run folder or its model.safetensors must be named"),
], ids=["another version", "other data", "other fields", "no run", "a file"])
def test_eval_refuses_in_one_sentence(tmp_path, monkeypatch, capsys, probed, file, change, said):
    if change:
        folder = shutil.copytree(probed[0].path, tmp_path/"run")
        (folder/f"{file}.json").write_text(json.dumps(change(json.loads((folder/f"{file}.json").read_text()))))
    elif file == "a file": (tmp_path/"run").touch()
    monkeypatch.setattr(sys, "argv", ["acl_eval", str(tmp_path/"run")])
    with pytest.raises(SystemExit) as exit: runpy.run_path(script("acl_eval", tmp_path), run_name="__main__")
    shown = capsys.readouterr()
    assert (exit.value.code, shown.out, shown.err.count("\n")) == (2, "", 1) and said in shown.err

def test_report_of_many_classes_stays_light(tmp_path, probed):
    C, epochs, g = 1000, 120, torch.Generator().manual_seed(0)
    folder = shutil.copytree(probed[0].path, tmp_path/"run")
    few = (folder/"report.html").stat().st_size
    env, summary = probed[0].env, probed[0].summary
    env["data"] |= {"counts": list(range(C, 0, -1)), "class_names": [f"class number {i}" for i in range(C)]}
    summary["per_class"] = torch.rand(C, generator=g).tolist()
    balance = {k: [1.] * C for k in ("attraction", "wrong_way", "repulsion")} | {"conflict_rate": .1, "steps": 1}
    (folder/"env.json").write_text(json.dumps(env)); (folder/"summary.json").write_text(json.dumps(summary))
    for name in ("history.jsonl", "balance.jsonl.gz"): (folder/name).unlink()
    for e in range(1, epochs + 1):
        append_row(folder/"history.jsonl", {**probed[0].history[0], "epoch": e})
        append_row(folder/"balance.jsonl.gz", {"epoch": e, "balance": balance})
    page = write_report(Run(folder))
    assert page.stat().st_size - few < 1_000_000 and page.read_text().count("<h2>") == 8

def test_the_doctor_sees_every_part_of_a_machine(tmp_path):
    r = started("acl_doctor", cwd=tmp_path)
    lines = [line.split(maxsplit=2) for line in r.stdout.splitlines()]
    names = "devices precision compile gather parity pixels decode views shared disk"
    assert " ".join(line[0] for line in lines) == names, r.stderr
    assert all(line[1] in ("ok", "slow", "missing") for line in lines) and (r.returncode, r.stderr) == (0, "")

def test_what_a_recipe_needs_and_lacks_is_exit_1(tmp_path, monkeypatch, capsys):
    from acl_nb import doctor
    monkeypatch.setattr(doctor, "CHECKS", {})
    monkeypatch.setattr(doctor, "step_rate", lambda r, data: len(data.train) * r.epochs / 3600)
    monkeypatch.setattr(sys, "argv", ["acl_doctor", "cifar100_lt", "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as exit: runpy.run_path(script("acl_doctor", tmp_path), run_name="__main__")
    data, memory, step, loading = capsys.readouterr().out.splitlines()
    assert exit.value.code == 1 and data.startswith("data      fails    CIFAR100 not found")
    assert memory.split()[:2] == ["memory", "ok"] and memory.endswith("fits 1 GPU of 16 GB")
    assert step.endswith("epochs in about 61 minutes") and loading.startswith("loading   ok       images in memory")

def pictures(root, part, images, labels):
    "Class folders of PNG files."
    for i, (image, label) in enumerate(zip(images, labels.tolist())):
        at = root/part/str(label)
        at.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(at/f"{i}.png")

def test_a_strength_is_chosen_on_the_validation_part_alone(tmp_path, capsys):
    data = digits_lt(imbalance=20)
    halves = {"test": slice(0, None, 2), "val": slice(1, None, 2)}
    pictures(tmp_path/"photos", "train", data.train.images, data.train.labels)
    for part, half in halves.items(): pictures(tmp_path/"photos", part, data.test.images[half], data.test.labels[half])
    r = Recipe(name="photos", dataset="folder_lt", data=str(tmp_path/"photos"), imbalance="as_is", size=16, policy="eval",
               encoder="resnet8_tiny", epochs=8, loss="ce", centers="none", precision="fp32")
    run = fit(r, tmp_path/"run", quiet=True, workers=0)
    _, parts = open_run(run.path)
    on = {name: outputs_of(parts, part) for name, part in (("test", parts.test), ("val", validation_part(parts)))}
    tau, of_test = (tune_tau(on[name].logits, on[name].labels, parts.data.counts)[0] for name in ("val", "test"))
    capsys.readouterr()
    acl_eval(str(run.path), tune="tau", out=[str(tmp_path/"e.json")])
    told, numbers = capsys.readouterr().out, json.loads((tmp_path/"e.json").read_text())
    assert f"τ = {tau:g}, chosen on 250 validation images" in told and numbers["adjustment"] in told
    expected = evaluate(adjust(on["test"].logits, parts.data.counts, tau), on["test"].labels, parts.data.counts)
    assert {k: numbers["scores"][k] for k in expected} == expected and numbers["before"]["top1"] == run.summary["top1"]
    assert tau != of_test       # with these images the test set would have chosen another
