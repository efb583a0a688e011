"""What a move of a control costs: computing, and computing with the figure's update. `python tests/bench_widgets.py`

256 images, 4 views, 100 classes, two losses; wall time, medians of the moves.
"""
import argparse
import os
import statistics
import time

import torch

from acl_nb.widgets import balance_explorer
from benching import Rows, out_option, processor_name

GOAL = 150          # milliseconds: what is felt as at once
LARGE = {"views": 4, "batch_size": 256, "classes": 100}
MOVES = {
    "temperature": ("temperature", (.05, .1, .2)),
    "right loss": ("right_loss", ("BCL", "PaCo", "ACL")),
    "ACL's negatives": ("right_negatives", ("prior", "adjusted", "batch")),
    "sort": ("sort", ("ratio", "images", "repulsion")),
    "seed (a new batch)": ("seed", (1, 2, 3)),
    "views (a new batch, 3 and 4)": ("views", (3, 4)),
}

def before(explorer, name):
    "Forget what earlier moves left and compute what stands before this one; a new batch starts from nothing."
    if name != "sort": explorer.read.forget()
    if name not in ("seed", "views"): explorer.read(**explorer.values)

def moves(explorer, name, values, times):
    "Milliseconds of each move: of the reading alone, of the whole redraw."
    reading, whole = [], []
    for k in range(times):
        value = values[k % len(values)]
        before(explorer, name)
        started = time.perf_counter()
        explorer.read(**explorer.values | {name: value})
        reading.append(1e3 * (time.perf_counter() - started))
        before(explorer, name)
        started = time.perf_counter()
        explorer.controls[name].value = value
        whole.append(1e3 * (time.perf_counter() - started))
    return statistics.median(reading), statistics.median(whole)

def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=15, help="how often each control is moved")
    out_option(ask, "widgets")
    args = ask.parse_args()
    torch.set_num_threads(min(2, os.cpu_count()))
    rows, section = Rows(args.out, processor_name()), "balance_explorer, 256 × 4 views × 100 classes, two losses"
    explorer = balance_explorer()
    for name, value in LARGE.items(): explorer.controls[name].value = value
    for value in (.05, .1, .2): explorer.controls["temperature"].value = value             # warm
    print(f"{section}, {torch.get_num_threads()} threads; goal: below {GOAL} ms")
    print(f"{'move':30} {'read ms':>9} {'redraw ms':>10}")
    rows.begin(section)
    for label, (name, values) in MOVES.items():
        read, redraw = moves(explorer, name, values, args.rounds)
        rows.add(section, label, "read", read, "ms")
        rows.add(section, label, "redraw", redraw, "ms")
        rows.add(section, label, "time ratio", redraw / GOAL, "×", f"goal of {GOAL} ms")
        print(f"{label:30} {read:9.1f} {redraw:10.1f}", flush=True)
    explorer.close()
    rows.write()

if __name__ == "__main__": main()
