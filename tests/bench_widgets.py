"What a move of a control costs: 256 images, 4 views, 100 classes, two losses; computing, and computing with the figure's update."
import argparse
import os
import statistics
import time

import torch

from acl_nb.widgets import balance_explorer
from benching import Rows, kept

LARGE = {"views": 4, "batch_size": 256, "classes": 100}
MOVES = {
    "temperature": ("temperature", (.05, .1, .2)),
    "right loss": ("right_loss", ("BCL", "PaCo", "ACL")),
    "ACL's negatives": ("right_negatives", ("prior", "adjusted", "batch")),
    "sort": ("sort", ("ratio", "images", "repulsion")),
    "seed (a new batch)": ("seed", (1, 2, 3)),
    "views (a new batch, 3 and 4)": ("views", (3, 4)),
}

def moves(explorer, name, values, times=15):
    "Milliseconds of each move: of the reading alone, of the whole redraw."
    reading, whole = [], []
    for k in range(times):
        value = values[k % len(values)]
        explorer.read.forget() if name != "sort" else None
        if name not in ("seed", "views"): explorer.read(**explorer.values)              # what was kept before the move
        started = time.perf_counter()
        explorer.read(**explorer.values | {name: value})
        reading.append(1e3 * (time.perf_counter() - started))
        explorer.read.forget() if name != "sort" else None
        if name not in ("seed", "views"): explorer.read(**explorer.values)
        started = time.perf_counter()
        explorer.controls[name].value = value
        whole.append(1e3 * (time.perf_counter() - started))
    return statistics.median(reading), statistics.median(whole)

def main():
    ask = argparse.ArgumentParser(description=__doc__)
    kept(ask, "widgets")
    args = ask.parse_args()
    torch.set_num_threads(min(2, os.cpu_count()))
    rows, section = Rows(args.out), "balance_explorer, 256 × 4 views × 100 classes, two losses"
    explorer = balance_explorer()
    for name, value in LARGE.items(): explorer.controls[name].value = value
    for value in (.05, .1, .2): explorer.controls["temperature"].value = value             # warm
    print(f"{section}, {torch.get_num_threads()} threads; goal: below 150 ms")
    print(f"{'move':30} {'read ms':>9} {'redraw ms':>10}")
    rows.begin(section)
    for label, (name, values) in MOVES.items():
        read, redraw = moves(explorer, name, values)
        rows.add(section, label, "reading", read, "ms")
        rows.add(section, label, "redraw", redraw, "ms")
        print(f"{label:30} {read:9.1f} {redraw:10.1f}", flush=True)
    rows.write()
    explorer.close()

if __name__ == "__main__": main()
