"The data command: exit codes, one-line errors, lists fetched from a server, a benchmark checked file by file."
import runpy
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision.io import write_jpeg

from acl_nb.datasets.lists import BENCHMARKS, git_blob_id

LISTS = {"train": b"train/a/1.jpg 0\ntrain/b/2.jpg 1\ntrain/a/3.jpg 0\n", "val": b"train/a/4.jpg 0\ntrain/b/5.jpg 1\n", "test": b"val/a/6.jpg 0\nval/b/7.jpg 1\n"}

def run(args, monkeypatch, capsys):
    "(exit code, stdout, stderr) of the command, in this process."
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder)/"acl_data"
        script.write_text("import sys\nfrom acl_nb.cli import acl_data\nsys.exit(acl_data())\n")        # what pip makes of settings.ini
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
        try: runpy.run_path(str(script), run_name="__main__")
        except SystemExit as e: code = e.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err

@pytest.fixture
def tiny(monkeypatch, tmp_path):
    "ImageNet-LT, shrunk to two classes, and a server that ships its lists; gives (server's address, its folder)."
    b = BENCHMARKS["imagenet_lt"]
    parts = {"train": (3, 1, 2), "val": (2, 1, 1), "test": (2, 1, 1)}
    monkeypatch.setitem(BENCHMARKS, "imagenet_lt", replace(b, classes=2, parts=parts, blobs={p: git_blob_id(c) for p, c in LISTS.items()}))
    shipped = tmp_path/"server"/b.folder
    shipped.mkdir(parents=True)
    for part, content in LISTS.items(): (shipped/b.file(part)).write_bytes(content)
    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=str(tmp_path/"server"))
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", shipped
    server.shutdown(); server.server_close()

def images(root):
    for content in LISTS.values():
        for line in content.decode().splitlines():
            path = root/line.split()[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8), str(path))

BAD = {
    "unknown action": (["fech"], "unknown action 'fech': did you mean fetch?"),
    "nothing to fetch": (["fetch"], "`name` must be given: fetch takes one of imagenet_lt, places_lt"),
    "no such benchmark": (["fetch", "imagenetlt"], "unknown benchmark 'imagenetlt': did you mean imagenet_lt?"),
    "no such data set": (["check", "digts_lt"], "unknown data set 'digts_lt': did you mean digits_lt"),
    "no lists": (["check", "places_lt"], "Places_LT_train.txt not found in data: `acl_data fetch places_lt --data data` puts it there"),
    "no server": (["fetch", "places_lt", "--base", "http://127.0.0.1:1"], "cannot be fetched"),
    "no folder tree": (["check", "folder_lt", "--data", "nowhere"], "must be a folder with one folder of images a class"),
}

@pytest.mark.parametrize("args, said", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(args, monkeypatch, capsys)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err and not [p for p in tmp_path.rglob("*") if p.is_file()]

def test_the_table(tmp_path, monkeypatch, capsys):
    code, out, err = run(["list", "--data", tmp_path], monkeypatch, capsys)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert (code, err) == (0, "") and rows["cifar100_lt"] == ["10,847", "100", "500", "5", "100", "35", "35", "30"]
    assert rows["inaturalist18"] == ["437,513", "8,142", "1,000", "2", "500", "–", "–", "–"]

def test_fetch_then_check(tiny, tmp_path, monkeypatch, capsys):
    base, shipped = tiny
    data = tmp_path/"data"
    code, out, err = run(["fetch", "imagenet_lt", "--data", data, "--base", base], monkeypatch, capsys)
    assert code == 0 and "image-net.org" in out and {p.name for p in data.iterdir()} == {p.name for p in shipped.iterdir()}
    code, out, err = run(["check", "imagenet_lt", "--data", data], monkeypatch, capsys)
    assert code == 2 and err.count("\n") == 1 and "3 missing: train/a/1.jpg, train/b/2.jpg, train/a/3.jpg" in err
    images(data)
    code, out, err = run(["check", "imagenet_lt", "--data", data, "--decode"], monkeypatch, capsys)
    assert (code, err) == (0, "") and "imagenet_lt test: 2 images, 2 classes, every file there and readable" in out
    code, out, err = run(["list", "--data", data], monkeypatch, capsys)
    assert "imagenet_lt" in out and ["3", "2", "2", "1", "2", "0", "0", "2"] in [line.split()[1:] for line in out.splitlines()]
    (data/"val/a/6.jpg").write_bytes((data/"val/a/6.jpg").read_bytes()[:-20])
    code, out, err = run(["check", "imagenet_lt", "--data", data, "--decode"], monkeypatch, capsys)
    assert code == 2 and err.count("\n") == 1 and "1 missing or broken: val/a/6.jpg" in err

def test_a_list_that_is_not_the_published_one_changes_nothing(tiny, tmp_path, monkeypatch, capsys):
    base, shipped = tiny
    (tmp_path/"ImageNet_LT_train.txt").write_text("mine")
    (shipped/"ImageNet_LT_train.txt").write_text("another")
    monkeypatch.setenv("ACL_LISTS_URL", base)
    code, out, err = run(["fetch", "imagenet_lt", "--data", tmp_path], monkeypatch, capsys)
    assert code == 2 and err.count("\n") == 1 and "must be the published list" in err and "the file that was there is kept" in err
    assert (tmp_path/"ImageNet_LT_train.txt").read_text() == "mine" and not list(tmp_path.glob("*.part"))

def test_a_fresh_process_ends_with_2_and_no_traceback(tmp_path):
    code = "import sys; sys.argv[0] = 'acl_data'; from acl_nb.cli import acl_data; acl_data()"
    (tmp_path/"go.py").write_text(code)
    r = subprocess.run([sys.executable, "go.py", "fech"], cwd=tmp_path, capture_output=True, text=True)
    assert (r.returncode, r.stdout, r.stderr) == (2, "", "error: unknown action 'fech': did you mean fetch?\n")
