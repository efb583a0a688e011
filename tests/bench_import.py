"""What one waits for before anything is computed: imports and the commands' --help.

`python tests/bench_import.py`

Each round starts every case once, as a process of its own, in rotating order. Medians of the wall clock and of the
processor's time; a busy machine lengthens the first alone.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benching import ROOT, Rows, out_option, processor_name
from scripts import write_scripts

TORCH = "import torch"
IMPORTS = [TORCH, "import acl_nb", "from acl_nb.losses import ACLLoss", "from acl_nb import ACLLoss", "from acl_nb import fit"]

def cases(folder):
    "name -> the words that start a process; the commands' scripts are written into a folder."
    python, scripts = sys.executable, write_scripts(folder)
    made = {code: [python, "-c", code] for code in ["pass", *IMPORTS]}
    lines = [f"{name} --help" for name in scripts] + ["acl_train --version", "acl_train --list"]
    return made | {line: [python, str(scripts[line.split()[0]]), *line.split()[1:]] for line in lines}

def seconds(words):
    "Wall clock and processor's time of a process."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{words}: {process.stderr.read().decode()[-500:]}"
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime

def measured(started, rounds):
    "name -> the seconds of every round."
    names = list(started)
    found = {name: [] for name in names}
    for r in range(-1, rounds):
        for name in names[r % len(names):] + names[:r % len(names)]:
            both = seconds(started[name])
            if r >= 0: found[name].append(both)
    return found

def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=9, help="interleaved rounds, after one that warms the file system")
    out_option(ask, "import")
    args = ask.parse_args()
    with tempfile.TemporaryDirectory() as folder: found = measured(cases(Path(folder)), args.rounds)
    rows = Rows(args.out, processor_name())
    section = "a fresh process"
    rows.begin(section)
    print(f"{'':40}{'wall, ms':>10}{'CPU, ms':>10}{'CPU above torch, ms':>22}")
    of_torch = [cpu for _, cpu in found[TORCH]]
    for name in found:
        wall, cpu = (1e3 * statistics.median(part) for part in zip(*found[name]))
        above = 1e3 * statistics.median(own - torch for (_, own), torch in zip(found[name], of_torch))
        rows.add(section, name, "wall", wall, "ms")
        rows.add(section, name, "CPU", cpu, "ms")
        rows.add(section, name, "CPU above", above, "ms", TORCH)
        print(f"{name:40}{wall:10.0f}{cpu:10.0f}{above:22.0f}")
    rows.write()

if __name__ == "__main__": main()
