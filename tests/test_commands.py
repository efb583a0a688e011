"What all commands share: a light start, the version, completion, and answers to words that belong elsewhere."
import io
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import acl_nb
from acl_nb.checks import code_commit
from acl_nb.datasets import BENCHMARKS, DATASETS
from acl_nb.inventory import ACTIONS
from acl_nb.losses import LOSSES
from acl_nb.recipes import RECIPES
from acl_nb.settings import Recipe
from acl_nb.trackers import TRACKERS

BIN = Path(sys.executable).parent
COMMANDS = ["acl_train", "acl_data", "acl_eval", "acl_doctor", "acl_study"]
FIELDS = {f.name for f in fields(Recipe)}

def in_process(name, *words):
    "Run an installed script in this process: a fresh one needs seconds to import torch."
    script = str(BIN/name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        with pytest.raises(SystemExit) as exit: runpy.run_path(script, run_name="__main__")
    return exit.value.code or 0

def test_the_room_of_the_commands_imports_no_torch():
    code = "import sys, acl_nb.commands; print(*{'torch', 'numpy', 'plotly'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "\n", done.stderr

def test_explorers_and_evaluation_import_no_other_room_of_the_command_line():
    code = """if True:
        import sys
        rooms = {f"acl_nb.{name}" for name in ("commands", "cli", "inventory", "doctor", "features", "share", "studies")}
        import acl_nb.widgets
        print(*rooms & {*sys.modules})
        import acl_nb.evaluation
        print(*rooms & {*sys.modules})
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "\nacl_nb.commands\n", done.stderr       # `acl_eval` is made by `command`, which is light

@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_version(name, capsys):
    assert in_process(name, "--version") == 0
    commit = code_commit()
    expected = f"acl_nb {acl_nb.__version__}" + (f", commit {commit}" if commit else "")
    assert capsys.readouterr().out == expected + "\n"

def offered(line):
    "What a shell gets for a line, by argcomplete's protocol, from a copy of this process."
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = io.StringIO()                 # pytest's own may lie on 8 or 9
        os.dup2(writer, 8)                                      # where a shell reads the answer
        os.environ |= {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
        try: runpy.run_path(str(BIN/line.split()[0]), run_name="__main__")  # ends by os._exit
        finally: os._exit(3)
    os.close(writer)
    with open(reader) as answer: words = answer.read().split("\v")
    assert os.waitpid(child, 0)[1] == 0
    return {word.strip() for word in words}

LINES = {                                                       # line -> all that must be offered for its last word
    "acl_train --": {"--loss", "--set", "--save-every", "--track", "--fields", "--version", "--help"},
    "acl_train ": set(RECIPES),
    "acl_train cifar100_lt --loss ": set(LOSSES),
    "acl_train --track ": set(TRACKERS),
    "acl_train --set lr=0.1 ": {f"{field}=" for field in FIELDS - {"name"}},
    "acl_train --fields ": FIELDS,
    "acl_data ": set(ACTIONS),
    "acl_data check ": {*DATASETS, *BENCHMARKS},
    "acl_eval --": {"--help", "--version"},
}

@pytest.mark.parametrize("line", LINES)
def test_a_shell_is_offered_what_may_follow(line):
    found = offered(line)
    assert LINES[line] <= found, LINES[line] - found
    assert "--save_every" not in found                         # one spelling is enough
    if line.endswith(("--loss ", "--track ")): assert found == LINES[line]

def test_what_is_offered_begins_as_typed():
    assert offered("acl_train cifar10") == {name for name in RECIPES if name.startswith("cifar10")}

def test_bash_completes_by_what_argcomplete_registers(tmp_path):
    "The function that `register-python-argcomplete` writes, called as bash calls it."
    script = f"""
export PATH="{BIN}:$PATH"
eval "$(register-python-argcomplete acl_train)"
complete -p acl_train
COMP_LINE="acl_train --set temp" COMP_POINT=20 COMP_TYPE=9
COMP_CWORD=2 COMP_WORDS=(acl_train --set temp)
_python_argcomplete acl_train temp --set
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    registered, reply = done.stdout.splitlines()
    assert "_python_argcomplete acl_train" in registered and reply.strip() == "temperature=", done

ELSEWHERE = {
    "an option that is a field": (["--lr", "0.1"], "`lr` is a field of the recipe: --set lr=0.1"),
    "with a hyphen": (["--key-momentum=0"], "`key_momentum` is a field of the recipe: --set key_momentum=0"),
    "with an underscore": (["--n_max", "9"], "`n_max` is a field of the recipe: --set n_max=9"),
    "without a value": (["--freeze"], "`freeze` is a field of the recipe: --set freeze=VALUE"),
    "a pair without --set": (["lr=0.1"], "`lr` is a field of the recipe: --set lr=0.1"),
    "a pair behind a name": (["digits_lt", "dim=8"], "`dim` is a field of the recipe: --set dim=8"),
    "a negative value": (["--tau", "-1"], "`tau` is a field of the recipe: --set tau=-1"),
    "a recipe file": (["mine.json"], "a recipe file is given by its option: --recipe mine.json"),
    "a run's folder": (["run"], "the recipe of a run is given by its file: --recipe run/recipe.json"),
    "an unknown field": (["--fields", "temprature"], "unknown field 'temprature': did you mean temperature?"),
    "an unknown tracker": (["--track", "trackoi"], "unknown tracker 'trackoi': did you mean trackio?"),
}

@pytest.mark.parametrize("words, sentence", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_word_that_belongs_elsewhere_is_answered(words, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"recipe.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert in_process("acl_train", *words) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert os.listdir(tmp_path) == ["run"]

def test_both_spellings_everywhere(capsys):
    for words in (["--save-every", "9"], ["--save_every", "9"]):
        assert in_process("acl_train", *words, "--set", "batch-size=32", "weight_decay=0", "--print") == 0
        printed = capsys.readouterr().out
        assert '"batch_size": 32' in printed and '"weight_decay": 0.0' in printed

def test_the_fields_of_a_recipe_are_told_from_the_source(capsys):
    assert in_process("acl_train", "--fields") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    told = {line.split()[0] for line in lines if re.match(r"[a-z]", line)} - {"field"}
    assert told == FIELDS
    source = Path(sys.modules["acl_nb.settings"].__file__).read_text()
    for field in FIELDS:                                        # its comment stands in the table
        comment = re.search(rf"^    {field}: .*  # (.+)$", source, re.M)[1]
        line = next(line for line in lines if line.split()[:1] == [field])
        assert comment.split(";")[0] in line, line
    assert in_process("acl_train", "--fields", "key-momentum") == 0
    assert re.search(r"^key_momentum +0.999 +of paco's second encoder +paco$", capsys.readouterr().out, re.M)
