"What is imported when, and what works where only torch is installed; `tests/bench_import.py` measures how long it takes."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent
SETTINGS = (ROOT/"settings.ini").read_text(encoding="utf-8")
CORE = {"torch", "torchvision", "fastcore", "numpy", "pillow"}        # torchvision needs the last two
NAMED = {"scikit-learn": "sklearn", "pillow": "PIL"}
REQUIRED = [re.match(r"[\w.-]+", r)[0] for r in re.search(r"^requirements = (.*)$", SETTINGS, re.M)[1].split()]
OTHERS = sorted(NAMED.get(r, r) for r in set(REQUIRED) - CORE)
HEAVY = ["torch._dynamo", "torch._inductor", "torchvision", "triton", "sympy", "pandas", "PIL", *OTHERS]

def fresh(code, *words):
    "What a new process prints."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code, *words], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

def imported(code, of):
    "Which of these modules a piece of code imports."
    return fresh(f"import sys\n{code}\nprint(*[m for m in {list(of)} if m in sys.modules])").split()

def test_the_package_alone_imports_nothing():
    assert imported("import acl_nb; acl_nb.__version__; dir(acl_nb)", ["torch", "numpy", *HEAVY]) == []

@pytest.mark.parametrize("code", ["from acl_nb.losses import ACLLoss", "from acl_nb import ACLLoss, SCLLoss, all_gather",
                                  "from acl_nb import pair_gradients, class_counts"])
def test_a_loss_imports_torch_and_nothing_heavy(code):
    by_torch = imported("import torch", HEAVY)
    assert set(imported(code, HEAVY)) <= set(by_torch)
    assert "torch" in imported(code, ["torch"])

BLOCKED = f"""
import sys
for name in {OTHERS}:
    if name not in ("filelock", "jinja2", "psutil", "tqdm"): sys.modules[name] = None       # torch may want these four
"""

def test_the_core_works_without_what_training_and_explorers_need():
    said = fresh(BLOCKED + """
import torch, torch.nn.functional as F
import acl_nb
from acl_nb import ViewPipeline, class_counts, make_loss, pair_gradients
from acl_nb.losses import LOSSES, TRAITS

counts, labels = class_counts(4, 50, 10), torch.tensor([0, 0, 1, 1, 2, 3])
z = F.normalize(torch.randn(6, 2, 8), dim=-1).requires_grad_()
centers = F.normalize(torch.randn(4, 8), dim=-1)
for name, traits in TRAITS.items():
    loss = make_loss(name, class_counts=counts)
    if traits.kind == "classifier": value = loss(z @ centers.T, labels)
    elif name == "paco":
        q = z.flatten(0, 1)
        y = labels.repeat_interleave(2)
        value = loss(q, q, y, y, q @ centers.T)
    elif traits.kind == "joint": value = loss(z, labels, z @ centers.T)
    else: value = loss(z, labels, *([0.9 * centers] if traits.keys == "means" else [centers]))
    value.backward()
    assert value.isfinite(), name
assert pair_gradients("acl", z.detach(), labels, centers).coef.isfinite().all()
views = ViewPipeline("cifar_sim", 32, (.5,) * 3, (.25,) * 3, views=2)(torch.zeros(2, 3, 40, 40, dtype=torch.uint8))
print(len(LOSSES), list(views.shape))
try: acl_nb.fit
except ImportError as e: print(e)
""")
    lines = said.splitlines()
    assert lines[0] == "13 [2, 2, 3, 32, 32]"
    assert re.fullmatch(r"`acl_nb.fit` needs \w+, which is not installed: pip install acl_nb brings it", lines[1])

def test_every_requirement_is_either_of_the_core_or_missed_by_it():
    assert CORE <= set(REQUIRED) and len(OTHERS) == len(REQUIRED) - len(CORE)
