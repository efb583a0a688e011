"Runs that are shown to trackio and wandb, by a stand-in for both: killed and gone on with; a service that fails."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from acl_nb.records import Run

SMALL = ["epochs=60", "n_max=20", "imbalance=4", "views=1", "dim=8", "hidden=8",
         "batch_size=32", "test_every=50"]

STAND_IN = """
import json
import os
import time
class Run:
    def log(self, numbers, step): note(log=numbers, step=step)
    def finish(self): note(finish=True)
def note(**what):
    with open(os.environ["NOTES"], "a") as file: file.write(json.dumps(what) + "\\n")
def init(**settings):
    if os.environ.get("SERVICE") == "fails": raise ConnectionError("no login")
    note(init=settings)
    return Run()
"""

def train(folder, tracker, service="works", settings=SMALL):
    "A process that trains and tracks; the stand-in for the library lies beside it."
    (folder/f"{tracker}.py").write_text(STAND_IN)
    script = folder/"program.py"
    script.write_text("from acl_nb.cli import acl_train\nif __name__ == '__main__': acl_train()\n")
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    env |= {"NOTES": str(folder/"notes"), "SERVICE": service}
    words = ["--out", "run", "--track", tracker, "--workers", "0", "--set", *settings]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, script, *words], cwd=folder, env=env, **pipes)

def notes(folder, what):
    "What the stand-in was asked; the last line may be half written."
    text = (folder/"notes").read_text() if (folder/"notes").exists() else ""
    lines = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    return [line for line in lines if what in line]

@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_killed_run_goes_on_as_the_same_run_there_and_no_epoch_comes_twice(tmp_path, tracker):
    for seen in (5, 20):
        job = train(tmp_path, tracker)
        while len(notes(tmp_path, "log")) < seen and job.poll() is None: time.sleep(0.1)
        assert job.poll() is None, job.communicate()[0]
        job.send_signal(signal.SIGKILL)
        job.wait()
        saved = len(Run(tmp_path/"run").history)
        assert 0 < saved < 60
    job = train(tmp_path, tracker)
    said, _ = job.communicate(timeout=600)
    assert job.returncode == 0, said
    begun = [note["init"] for note in notes(tmp_path, "init")]
    assert len(begun) == 3 and begun[0] == begun[1] == begun[2]
    memory = json.loads((tmp_path/"run"/f"{tracker}.json").read_text())
    assert memory["epochs"] == 60
    assert (begun[0]["name"], begun[0]["resume"]) == (f"run-{memory['id']}", "allow")
    assert begun[0].get("id") == (memory["id"] if tracker == "wandb" else None)
    assert begun[0]["project"] == "acl_nb"
    assert begun[0]["config"]["dim"] == 8 and "data" not in begun[0]["config"]
    *epochs, summary = notes(tmp_path, "log")
    steps = [note["step"] for note in epochs]
    assert sorted(set(steps)) == steps                             # each once, in their order
    assert len(steps) >= 58                                       # a kill between note and call loses an epoch
    history = Run(tmp_path/"run").history
    for note in epochs:
        row = history[note["step"] - 1]
        assert note["log"]["loss"] == row["loss"]
        assert note["log"]["conflict_rate"] == row["balance"]["conflict_rate"]
        assert note["log"]["repulsion/few"] == row["balance"]["repulsion"]["few"]
    assert summary["step"] == 60
    assert summary["log"]["summary/top1"] == Run(tmp_path/"run").summary["top1"]
    assert len(notes(tmp_path, "finish")) == 1

def test_a_tracker_that_fails_is_one_warning_and_the_run_is_done(tmp_path):
    job = train(tmp_path, "wandb", "fails", [s.replace("60", "3") for s in SMALL])
    said, _ = job.communicate(timeout=600)
    assert job.returncode == 0 and Run(tmp_path/"run").finished, said
    assert said.count("wandb failed, and the run goes on without it (ConnectionError: no login)") == 1
    assert "Traceback" not in said and not notes(tmp_path, "log")

def test_a_tracker_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch, capsys):
    from acl_nb.cli import acl_train
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(SystemExit) as exit: acl_train("digits_lt", track="trackio", epochs="1")
    assert exit.value.code == 2
    sentence = "`trackio` must be installed to track a run: pip install 'acl_nb[trackio]'"
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert not Path("runs").exists()
