"What a type checker says of a program that uses the package; half a minute at first, then seconds."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed, which the extra dev brings")
ROOT, USE = Path(__file__).parents[1], Path(__file__).with_name("typed_use.py")
CACHE = ROOT/".pytest_cache"/"mypy"

def checked(path):
    "What mypy says of a file in its strictest mode; the package is looked at as an installed one is."
    env = {**os.environ, "MYPYPATH": str(ROOT)}
    words = ["--strict", "--follow-imports=silent", "--no-error-summary", "--cache-dir", str(CACHE), str(path)]
    command = [sys.executable, "-m", "mypy", *words]
    done = subprocess.run(command, env=env, cwd=path.parent, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout

def test_a_users_program_has_no_error_and_runs():
    assert checked(USE) == ""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(USE)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("`z` must have unit length") and "torch.Size([])" in done.stdout

WRONG = {
    'acl_nb.fit("digits_lt", "runs/mine")': 'Argument 1 to "fit" has incompatible type "str"; expected "Recipe"',
    'acl_nb.ACLLoss(temperature="cold")': 'Argument "temperature" to "ACLLoss" has incompatible type "str"',
    "acl_nb.ACLLoss(temprature=0.1)": 'Unexpected keyword argument "temprature" for "ACLLoss"',
    "acl_nb.acl_loss(torch.ones(2, 2, 2))": 'Missing positional argument "labels" in call to "acl_loss"',
    'acl_nb.pair_gradients("acl", torch.ones(2, 2, 2)).coefs': '"PairGradients" has no attribute "coefs"',
    "x: str = acl_nb.load_model('runs/mine')": 'expression has type "Network", variable has type "str"',
    "acl_nb.ACLLos": 'Module has no attribute "ACLLos"',
}

def test_a_wrong_use_is_reported_on_its_line(tmp_path):
    program = tmp_path/"wrong.py"
    program.write_text("\n".join(["import torch", "import acl_nb", *WRONG]))
    found = re.findall(r"wrong\.py:(\d+): error: (.*)", checked(program))
    said = {int(line): text for line, text in found}
    assert list(said) == list(range(3, 3 + len(WRONG))), found
    for text, expected in zip(said.values(), WRONG.values()): assert expected in text
