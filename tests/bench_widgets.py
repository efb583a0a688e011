"What a move of a control costs: 256 images, 4 views, 100 classes, two losses; computing, and computing with the figure's update."
import os
import statistics
import time

import torch

from acl_nb.widgets import balance_explorer

LARGE = {"views": 4, "batch_size": 256, "classes": 100}
MOVES = {"temperature": ("temperature", (.05, .1, .2)), "right loss": ("right_loss", ("BCL", "PaCo", "ACL")), "ACL's negatives": ("right_negatives", ("prior", "adjusted", "batch")),
         "sort": ("sort", ("ratio", "images", "repulsion")), "seed (a new batch)": ("seed", (1, 2, 3)), "views (a new batch, 3 and 4)": ("views", (3, 4))}

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

if __name__ == "__main__":
    torch.set_num_threads(min(2, os.cpu_count()))
    explorer = balance_explorer()
    for name, value in LARGE.items(): explorer.controls[name].value = value
    for value in (.05, .1, .2): explorer.controls["temperature"].value = value             # warm
    print(f"balance_explorer, 256 x 4 views x 100 classes, two losses, {torch.get_num_threads()} threads; goal: below 150 ms")
    print(f"{'move':30} {'read ms':>9} {'redraw ms':>10}")
    for label, (name, values) in MOVES.items(): print("{:30} {:9.1f} {:10.1f}".format(label, *moves(explorer, name, values)), flush=True)
    explorer.close()
