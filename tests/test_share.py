"Sharing a run: what is in the folder and what is not, the zip, and a stand-in of the hub."
import os
import shutil
import socket
import zipfile

import huggingface_hub
import pytest
from PIL import Image

from acl_nb.networks import load_network, save_network
from acl_nb.recipes import read_recipe, recipe
from acl_nb.settings import Recipe
from acl_nb.share import FILES, acl_share, share_folder
from acl_nb.trainer import fit
from hub import TOKEN, serve
from ranks import program

SMALL = dict(views=2, n_max=20, imbalance=4, dim=8, hidden=8, batch_size=16, epochs=2)
SECRETS = ("ada-4711", "photos-4711", "broken-4711")    # user, folder of the data, a file in it
MACHINE = "laptop-4711"

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return fit(recipe("digits_lt", **SMALL), tmp_path_factory.mktemp("runs")/"digits", quiet=True)

def photographs(folder):
    "Three classes of small pictures, one file broken; their names would break a table."
    for k, name in enumerate(("a|b", "<b>tit", "wren")):
        for part, n in (("train", 12 - 4 * k), ("test", 4)):
            (folder/part/name).mkdir(parents=True)
            for i in range(n):
                picture = Image.new("RGB", (40, 40), (60 * k, 20 * i, 90))
                picture.save(folder/part/name/f"{i}.png")
    (folder/"train"/"wren"/"broken-4711.png").write_bytes(b"\x89PNG\r\n\x1a\n, and no more")
    return folder

@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A run on image files, by a user with a name on a machine with a name."
    home = tmp_path_factory.mktemp("home")/"ada-4711"
    of_files = SMALL | dict(dataset="folder_lt", imbalance="as_is", n_max=None, size=32, on_error="skip")
    r = Recipe(name="own", data=str(photographs(home/"photos-4711")), **of_files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: MACHINE)
        for name in ("HOME", "USERPROFILE"): patch.setenv(name, str(home))
        for name in ("USER", "LOGNAME", "USERNAME"): patch.setenv(name, "ada-4711")
        return fit(r, home/"run", quiet=True)

def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

def test_nothing_of_the_machine_is_in_the_folder(tmp_path, own):
    kept = content(own.path)
    for secret in SECRETS:
        files = ("recipe.json", "summary.json", "report.html")
        held = any(secret.encode() in kept[name] for name in files)
        assert held, f"{secret} is not in the run, so that it can't be missing in the copy"
    files = content(share_folder(own, tmp_path/"shared"))
    assert set(files) == set(FILES)
    secrets = [*SECRETS, MACHINE, own.recipe["data"], str(own.path), own.env["platform"]]
    for name, data in files.items():
        for secret in secrets:
            for encoding in ("utf-8", "utf-16-le"):
                assert secret.encode(encoding) not in data, (name, secret)

def test_what_is_shared_is_the_run(tmp_path, own):
    shared = share_folder(own, tmp_path/"shared", "ada/birds", "mit")
    here = own.network.state_dict()
    there = load_network(shared/"model.safetensors").state_dict()
    assert here.keys() == there.keys() and all(here[k].equal(there[k]) for k in here)
    assert read_recipe(shared/"recipe.json", data=own.recipe["data"]) == read_recipe(own.path/"recipe.json")
    card = (shared/"README.md").read_text()
    assert "| a\\|b | 12 |" in card and "&lt;b&gt;tit |" in card and "<b>" not in card
    assert "acl_predict ada/birds" in card and "## License\n\nmit" in card
    assert 'from acl_nb.models import load_model\n\nnetwork = load_model("ada/birds")' in card
    assert "1 could not be read" in (shared/"report.html").read_text()
    metadata = huggingface_hub.ModelCard(card).data
    assert (metadata.library_name, metadata.license) == ("acl_nb", "mit")
    assert metadata.pipeline_tag == "image-classification"
    values = {result.metric_name: result.metric_value for result in metadata.eval_results}
    assert values["accuracy"] == own.summary["top1"]

def script(folder):
    "The console script as pip would make it."
    path = folder/"acl_share"
    path.write_text("from acl_nb.share import acl_share\nif __name__ == '__main__': acl_share()\n")
    return path

def started(folder, *args, **env):
    there = {name: value for name, value in os.environ.items() if name.startswith("HF_")}
    there |= {"HF_HOME": str(folder/"hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    return program(script(folder), *args, cwd=folder, **there | env)

@pytest.fixture
def hub(monkeypatch):
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        # it would ask once a day for a list of programs that may have called it
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield hub

UPLOAD = ["POST /api/repos/create", "POST /api/validate-yaml",
          "POST /api/models/ada/digits/preupload/main", "POST /api/models/ada/digits/commit/main"]

def test_the_command_uploads_the_folder_and_nothing_else(tmp_path, digits, hub):
    done = started(tmp_path, digits.path, "--hub", "ada/digits", "--private")
    assert done.returncode == 0, done.stderr
    first, *files, last = done.stdout.splitlines()
    assert (first, last) == (f"to {hub.address}/ada/digits:", f"{hub.address}/ada/digits")
    assert [line.split()[-1] for line in files] == list(FILES)
    assert hub.repos == {"ada/digits": content(share_folder(digits, tmp_path/"shared", "ada/digits"))}
    assert hub.private == {"ada/digits"} and set(hub.asked) == set(UPLOAD), hub.asked

def test_what_was_uploaded_can_be_fetched(tmp_path, digits, hub):
    assert digits.push_to_hub("ada/digits", quiet=True) == f"{hub.address}/ada/digits"
    assert hub.private == set()
    hub.asked.clear()
    of = dict(cache_dir=tmp_path, endpoint=hub.address)
    fetched = huggingface_hub.hf_hub_download("ada/digits", "model.safetensors", **of)
    with open(fetched, "rb") as file: assert file.read() == (digits.path/"model.safetensors").read_bytes()
    asked = {path.split()[-1] for path in hub.asked}
    assert asked == {"/ada/digits/resolve/main/model.safetensors"}

def refused(capsys, code, *args, **kwargs):
    "The one line that the command says."
    with pytest.raises(SystemExit) as exit: acl_share(*args, **kwargs)
    shown = capsys.readouterr()
    assert exit.value.code == code and shown.err.count("\n") == 1 and shown.err.startswith("error: "), shown
    return shown.err

@pytest.mark.parametrize("status, code, said", [
    (401, 2, "the hub must know who you are"), (403, 2, "must have the right to write to ada/digits"),
    (404, 2, "of a user or an organisation that exists"), (500, 1, "nothing can be uploaded"),
])
def test_a_refusal_of_the_hub_is_one_line(digits, hub, capsys, status, code, said):
    hub.refusal = status
    assert said in refused(capsys, code, digits.path, hub="ada/digits")
    assert hub.repos == {}

def test_an_existing_repository_is_left_alone_unless_it_is_to_be_updated(digits, hub, capsys):
    hub.repos["ada/digits"] = {"README.md": b"mine", "notes.txt": b"mine"}
    said = refused(capsys, 2, digits.path, hub="ada/digits")
    assert "ada/digits exists on the hub already; --update" in said
    assert hub.repos["ada/digits"] == {"README.md": b"mine", "notes.txt": b"mine"}
    acl_share(digits.path, hub="ada/digits", update=True)
    held = hub.repos["ada/digits"]
    assert set(held) == {*FILES, "notes.txt"} and held["notes.txt"] == b"mine"
    assert b"library_name: acl_nb" in held["README.md"]

def test_without_a_way_to_the_hub_it_is_one_line(digits, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = refused(capsys, 1, digits.path, hub="ada/digits")
    assert said.startswith("error: http://127.0.0.1:9: nothing can be uploaded: ")

@pytest.mark.parametrize("name", ["digits", "ada/", "a/b/c", "ada/di gits", "ada/di--gits"])
def test_a_wrong_name_is_refused_before_anything_is_asked(digits, hub, capsys, name):
    refused(capsys, 2, digits.path, hub=name)
    assert hub.asked == []

def test_without_a_token_nothing_is_asked(tmp_path, digits, hub):
    done = started(tmp_path, digits.path, "--hub", "ada/digits", HF_TOKEN="")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "hf auth login" in done.stderr
    assert hub.asked == []

def test_a_zip_is_the_folder_and_the_same_each_time(tmp_path, digits):
    for name in ("a.zip", "b.zip"):
        done = started(tmp_path, digits.path, "--zip", name)
        assert (done.returncode, done.stderr, done.stdout.splitlines()[-1]) == (0, "", name)
    assert (tmp_path/"a.zip").read_bytes() == (tmp_path/"b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path/"a.zip") as archive: archive.extractall(tmp_path/"out")
    assert content(tmp_path/"out") == content(share_folder(digits, tmp_path/"shared"))

def test_wrong_folders_are_refused(tmp_path, digits, capsys):
    assert "a run folder must hold recipe.json" in refused(capsys, 2, tmp_path, out=tmp_path/"new")
    (tmp_path/"begun").mkdir()
    (tmp_path/"begun"/"recipe.json").write_bytes((digits.path/"recipe.json").read_bytes())
    assert "must hold a finished run" in refused(capsys, 2, tmp_path/"begun", out=tmp_path/"new")
    assert "it holds other files" in refused(capsys, 2, digits.path, out=tmp_path)
    (tmp_path/"mine.zip").write_bytes(b"mine")
    assert "it is another file" in refused(capsys, 2, digits.path, zip=tmp_path/"mine.zip")
    assert (tmp_path/"mine.zip").read_bytes() == b"mine" and not (tmp_path/"new").exists()

def test_a_model_that_its_users_could_not_use_is_refused(tmp_path, digits, capsys):
    old = shutil.copytree(digits.path, tmp_path/"old")
    save_network(load_network(old/"model.safetensors"), old/"model.safetensors")     # as earlier versions wrote it
    assert "`acl_eval RUN` writes it anew" in refused(capsys, 2, old, out=tmp_path/"new")
