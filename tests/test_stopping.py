"""Runs that are told to stop by a signal to their whole job, as torchrun, SLURM and a terminal send it, with processes that load images.

Some ten seconds each; ACL_SLOW=1 runs all, and ACL_STOPS=20 stops the run with workers as often.
"""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from acl_nb.checkpoints import latest
from acl_nb.records import Run
from pictures import folder, recipe_file
from ranks import SLOW, port, some
from test_resume import content

STOPS = int(os.environ.get("ACL_STOPS", 2))
BIN = Path(sys.executable).parent

@pytest.fixture(scope="module")
def pictures(tmp_path_factory): return folder(tmp_path_factory.mktemp("pictures"))

@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    "So large that the training waits for its loading processes most of the time, and a signal meets it there."
    return folder(tmp_path_factory.mktemp("photographs"), times=120)

def start(arguments, cwd, ranks=1, restarts=0, script=None, env=None):
    "acl_train, or a script, as a job of its own: the leader of a new process group."
    command = [str(BIN/"acl_train")] if script is None else [sys.executable, str(script)]
    if ranks > 1 or restarts:
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port())]
        launch += ["--max-restarts", str(restarts)]
        command = [sys.executable, *launch, *(["--no-python", *command] if script is None else [str(script)])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return subprocess.Popen([*command, *map(str, arguments)], cwd=cwd, env=env, **pipes)

def wait_for(found, job, seconds=120):
    end = time.time() + seconds
    while not found() and job.poll() is None and time.time() < end: time.sleep(0.01)
    assert found(), job.communicate(timeout=60)[0]

def rows(folder): return len((folder/"history.jsonl").read_text().splitlines()) if (folder/"history.jsonl").exists() else 0

def signal_group(job, *numbers, apart=0.01):
    for number in numbers:
        os.killpg(job.pid, number)
        time.sleep(apart)

SIGNALS = {"SIGTERM": (15,), "SIGINT": (2,), "SIGTERM twice": (15, 15), "SIGINT, then SIGTERM": (2, 15)}

@pytest.mark.parametrize("numbers", some(SIGNALS, "SIGTERM twice", "SIGINT"))
def test_a_signal_to_the_group_saves(photographs, tmp_path, numbers):
    mine = recipe_file(tmp_path/"mine.json", photographs, epochs=500)
    job = start(["--recipe", mine, "--out", "run", "--workers", 1, "--save_every", 0], tmp_path)
    wait_for(lambda: latest(tmp_path/"run"/"checkpoint"), job)
    signal_group(job, *numbers)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + numbers[0], said
    assert said.count("stopped: stopped by SIG") == 1 and "Traceback" not in said, said
    assert latest(tmp_path/"run"/"checkpoint") and not (tmp_path/"run"/"summary.json").exists()
    assert not (tmp_path/"run"/"lock").exists()

def test_a_signal_during_a_test_saves(pictures, tmp_path):
    "The test would take a minute; the signal comes into it, and the run ends before."
    script = tmp_path/"slow.py"
    script.write_text("""
import time
import acl_nb.judging
from acl_nb.cli import acl_train
answers = acl_nb.judging._answers
def slowly(*arguments):
    open("testing", "w").close()
    time.sleep(1.5)
    return answers(*arguments)
acl_nb.judging._answers = slowly
import acl_nb.build
share = acl_nb.build.share_of_test
acl_nb.build.share_of_test = lambda n: share(n, 1)
if __name__ == "__main__": acl_train()
""")
    mine = recipe_file(tmp_path/"mine.json", pictures, epochs=500, views=1)
    job = start(["--recipe", mine, "--out", "run", "--workers", 1], tmp_path, script=script)
    wait_for((tmp_path/"testing").exists, job)
    told = time.time()
    signal_group(job, 15)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 143 and time.time() - told < 40 and "Traceback" not in said, said
    steps = 130 * 4 // 5 // 16                                             # a fifth of the pictures is the test
    assert latest(tmp_path/"run"/"checkpoint").name.startswith(f"at_0_{steps}_") and rows(tmp_path/"run") == 0

@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_nobody_stays_of_a_run_that_is_killed(photographs, tmp_path, method):
    script = tmp_path/"mine.py"
    script.write_text(f"""
import multiprocessing
from acl_nb.cli import acl_train
if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    acl_train()
""")
    mine = recipe_file(tmp_path/"mine.json", photographs, epochs=500)
    job = start(["--recipe", mine, "--out", "run", "--workers", 1, "--save_every", 0], tmp_path, script=script)
    wait_for(lambda: latest(tmp_path/"run"/"checkpoint"), job)
    job.kill()
    job.communicate(timeout=60)                     # the output closes when nobody can write to it any more

@pytest.mark.parametrize("whom", ["the group of torchrun", pytest.param("torchrun alone", marks=SLOW)])
def test_two_ranks_with_workers_under_torchrun(photographs, tmp_path, whom):
    mine = recipe_file(tmp_path/"mine.json", photographs, epochs=500)
    job = start(["--recipe", mine, "--out", "run", "--workers", 1, "--save_every", 0], tmp_path, ranks=2)
    wait_for(lambda: latest(tmp_path/"run"/"checkpoint"), job)
    before = latest(tmp_path/"run"/"checkpoint")
    if whom == "torchrun alone": job.terminate()
    else: signal_group(job, 15)
    said, _ = job.communicate(timeout=60)
    assert said.count("stopped: stopped by SIGTERM; the same command goes on from here") == 1, said
    assert "killed by signal" not in said and "LoaderDied" not in said, said
    assert latest(tmp_path/"run"/"checkpoint") and not (tmp_path/"run"/"summary.json").exists()

@SLOW
def test_stopped_again_and_again_with_workers(photographs, tmp_path):
    "The run ends as one that was never interrupted."
    mine, rng = recipe_file(tmp_path/"mine.json", photographs, epochs=3, precision="fp32"), random.Random(0)
    arguments = ["--recipe", mine, "--workers", 2, "--save_every", 300]
    whole = start([*arguments, "--out", "whole"], tmp_path)
    said, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, said
    stops = done = 0
    while stops < STOPS:
        before = latest(tmp_path/"run"/"checkpoint")
        job = start([*arguments, "--out", "run"], tmp_path)
        wait_for((tmp_path/"run"/"lock").exists, job)
        time.sleep(rng.uniform(0., 4.))
        signal_group(job, 15)
        said, _ = job.communicate(timeout=60)
        if (tmp_path/"run"/"report.html").exists():                        # it was through: begin anew
            assert content(tmp_path/"run") == content(tmp_path/"whole")
            done += 1
            subprocess.run(["rm", "-r", tmp_path/"run"], check=True)
            continue
        if job.returncode == -15: assert latest(tmp_path/"run"/"checkpoint") == before, said    # before the first step
        else:
            assert job.returncode == 143 and "Traceback" not in said, said
            assert latest(tmp_path/"run"/"checkpoint")
            stops += 1
    job = start([*arguments, "--out", "run"], tmp_path)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert content(tmp_path/"run") == content(tmp_path/"whole")
    print(f"{stops} stops, {done} runs that were through before")

CRASH = """
import os
from pathlib import Path
import acl_nb.cli
from acl_nb.cli import acl_train
class CrashOnce:
    def after_epoch(self, run):
        first = Path("crashed")
        if run.epoch == 3 and not first.exists():
            first.touch()
            os._exit(1)
    def begin(self, run):
        with open("begun", "a") as file: file.write(f"{run.epoch}\\n")
acl_nb.cli._probes = lambda recipe, every: [CrashOnce()]
if __name__ == "__main__": acl_train()
"""

def test_a_restart_by_torchrun_goes_on_though_never_was_asked(pictures, tmp_path):
    script = tmp_path/"crash.py"
    script.write_text(CRASH)
    mine = recipe_file(tmp_path/"mine.json", pictures, epochs=5)
    arguments = ["--recipe", mine, "--out", "run", "--resume", "never", "--workers", 0]
    job = start(arguments, tmp_path, restarts=2, script=script)
    said, _ = job.communicate(timeout=240)
    assert job.returncode == 0, said
    assert (tmp_path/"begun").read_text().split() == ["0", "2"]             # the third epoch was not saved when it crashed
    assert len(Run(tmp_path/"run").history) == 5 and Run(tmp_path/"run").finished

def test_the_pipe_of_the_output_may_close(pictures, tmp_path):
    mine = recipe_file(tmp_path/"mine.json", pictures, epochs=3)
    command = f"{BIN/'acl_train'} --recipe {mine} --out run --workers 0 | head -1"
    r = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert Run(tmp_path/"run").finished and "Traceback" not in r.stderr and "BrokenPipe" not in r.stderr, r.stderr

@pytest.mark.parametrize("encoding", ["cp932", *(pytest.param(e, marks=SLOW) for e in ("ascii", "latin-1"))])
def test_a_terminal_that_does_not_know_a_character(pictures, tmp_path, encoding):
    mine = recipe_file(tmp_path/"mine.json", pictures, epochs=2)
    job = start(["--recipe", mine, "--out", "run", "--workers", 0], tmp_path, env={"PYTHONIOENCODING": encoding})
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and Run(tmp_path/"run").finished and "Traceback" not in said, said
