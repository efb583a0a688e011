"What the benches share: interleaved rounds, and rows that are kept in bench/*.json."
import json
import os
import platform
import statistics
import subprocess
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

def device_name():
    "The device that is measured, as its maker calls it."
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()

def processor_name():
    "The CPU, whether or not there is a GPU beside it."
    try: lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError: return platform.machine()
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())

def commit_here():
    "The commit that is measured, with a + where files differ from it; None outside a repository."
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--", "acl_nb", "tests")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError): return os.environ.get("ACL_NB_COMMIT")

class Rows:
    "The rows of one file; what a section measured anew on this device replaces what it measured there before."
    def __init__(self, path, device=None):
        self.path = Path(path) if path else None        # without a path nothing is written
        kept = self.path is not None and self.path.is_file()
        self.rows = json.loads(self.path.read_text(encoding="utf-8")) if kept else []
        self.about = {"commit": commit_here(), "date": str(date.today()), "device": device or device_name(),
                      "threads": torch.get_num_threads(), "torch": torch.__version__}

    def begin(self, section):
        "Forget what the section once measured on this device."
        self.rows = [r for r in self.rows if (r["section"], r["device"]) != (section, self.about["device"])]

    def add(self, section, case, figure, value, unit, partner=None):
        "One number; `partner` names the case of the same run that a ratio divides by."
        row = {**self.about, "section": section, "case": case, "figure": figure,
               "value": value, "unit": unit, "partner": partner}
        self.rows.append(row)
        return row

    def write(self):
        "Whole or not at all; one row per line."
        if self.path is None: return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in self.rows)
        part.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        part.replace(self.path)

def out_option(ask, name):
    "The option that says where the rows of a bench are kept."
    ask.add_argument("--out", default=ROOT/"bench"/f"{name}.json", help="file of the rows; '' keeps none")

def interleaved(steps, rounds):
    "Processor seconds of every step in every round; the order rotates."
    names, seconds = list(steps), {k: [] for k in steps}
    for r in range(-2, rounds):
        for k in names[r % len(names):] + names[:r % len(names)]:
            start = time.process_time()
            steps[k]()
            if r >= 0: seconds[k].append(time.process_time() - start)
    return seconds

def median_ratio(a, b):
    "The median over the rounds of a / b, each round's own."
    return statistics.median(x / y for x, y in zip(a, b))
