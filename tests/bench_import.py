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
import time
from configparser import ConfigParser
from pathlib import Path

from benching import ROOT, Rows, out_option, processor_name

TORCH = "import torch"
IMPORTS = [TORCH, "import acl_nb", "from acl_nb.losses import ACLLoss", "from acl_nb import ACLLoss", "from acl_nb import fit"]

def commands():
    "The lines that are to answer at once: name -> words."
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    names = [script.split("=")[0] for script in ini["DEFAULT"]["console_scripts"].split()]
    lines = [f"{name} --help" for name in names] + ["acl_train --version", "acl_train --list"]
    return {line: line.split() for line in lines}

def cases():
    "name -> the words that start a process."
    python, scripts = sys.executable, Path(sys.executable).parent
    made = {code: [python, "-c", code] for code in ["pass", *IMPORTS]}
    return made | {line: [python, str(scripts/name), *rest] for line, (name, *rest) in commands().items()}

def seconds(words):
    "Wall clock and processor's time of a process."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{words}: {process.stderr.read().decode()[-500:]}"
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime

def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=9, help="interleaved rounds, after one that warms the file system")
    out_option(ask, "import")
    args = ask.parse_args()
    started, names = cases(), list(cases())
    found = {name: [] for name in names}
    for r in range(-1, args.rounds):
        for name in names[r % len(names):] + names[:r % len(names)]:
            measured = seconds(started[name])
            if r >= 0: found[name].append(measured)
    rows = Rows(args.out, processor_name())
    section = "a fresh process"
    rows.begin(section)
    print(f"{'':40}{'wall, ms':>10}{'CPU, ms':>10}{'CPU above torch, ms':>22}")
    of_torch = [cpu for _, cpu in found[TORCH]]
    for name in names:
        wall, cpu = (1e3 * statistics.median(part) for part in zip(*found[name]))
        above = 1e3 * statistics.median(own - torch for (_, own), torch in zip(found[name], of_torch))
        rows.add(section, name, "wall", wall, "ms")
        rows.add(section, name, "CPU", cpu, "ms")
        rows.add(section, name, "CPU above", above, "ms", TORCH)
        print(f"{name:40}{wall:10.0f}{cpu:10.0f}{above:22.0f}")
    rows.write()

if __name__ == "__main__": main()
