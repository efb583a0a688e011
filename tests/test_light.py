"What is imported when, and what works where only torch is installed; tests/bench_import.py measures it."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from acl_nb.commands import argument_parser
from acl_nb.entry import COMMANDS, signature_of
from scripts import ENTRIES, SETTINGS, write_scripts

ROOT = Path(__file__).parents[1]
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

@pytest.mark.parametrize("code", [
    "from acl_nb.losses import ACLLoss", "from acl_nb import ACLLoss, SCLLoss, all_gather",
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

def test_readme_names_every_extra():
    extras = re.findall(r"^(\w+)_requirements = ", SETTINGS, re.M)
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    assert {f"acl_nb[{extra}]" for extra in extras if extra != "bench"} == set(re.findall(r"acl_nb\[\w+\]", readme))

# --- commands ---

def test_every_command_begins_at_the_entry():
    assert ENTRIES == {name: f"acl_nb.entry:{name}" for name in COMMANDS}

@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_version_come_without_torch(name, tmp_path):
    run = f"import runpy, sys\nsys.argv[0] = {str(write_scripts(tmp_path)[name])!r}\n"
    run += "try: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as e: print('code', e.code)\n"
    run += f"print(*[m for m in {['torch', 'numpy', *HEAVY]} if m in sys.modules])"
    for word, begins in ("--help", f"usage: {name}"), ("--version", "acl_nb "):
        *said, code, found = fresh(run, word).splitlines()
        assert said[0].startswith(begins) and code == "code 0"
        assert found == "", f"{name} {word} imports {found}"

def test_the_signature_is_that_of_the_command():
    from importlib import import_module
    for name, module in COMMANDS.items():
        real = getattr(import_module(f"acl_nb.{module}"), name)
        assert argument_parser(signature_of(name)).format_help() == argument_parser(real.__wrapped__).format_help()

def test_a_script_that_is_asked_for_more_is_the_command_itself(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(write_scripts(tmp_path)["acl_train"])]
    done = subprocess.run([*script, "digits_lt", "--print", "--epochs", "7"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and '"epochs": 7' in done.stdout, done.stderr
    wrong = subprocess.run([*script, "--lr", "0.1"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == "error: `lr` is a field of the recipe: --set lr=0.1\n"
