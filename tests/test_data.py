"""The data command: exit codes, one-line errors, lists fetched from a server, a benchmark checked file by file.

And the image decoders, each that this machine has: the same pixels, upright, the same refusals.
"""
import io
import os
import runpy
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from acl_nb.checks import BadInput
from acl_nb.datasets import decoders
from acl_nb.datasets.files import ImageFiles, check_files, imagenet_lt, read_image
from acl_nb.datasets.lists import BENCHMARKS, fetch_lists, git_blob_id, read_folder
from ranks import program

LISTS = {"train": b"train/a/1.jpg 0\ntrain/b/2.jpg 1\ntrain/a/3.jpg 0\n", "val": b"train/a/4.jpg 0\ntrain/b/5.jpg 1\n", "test": b"val/a/6.jpg 0\nval/b/7.jpg 1\n"}

def run(args, monkeypatch, capsys):
    "(exit code, stdout, stderr) of the command, in this process."
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder)/"acl_data"
        script.write_text("import sys\nfrom acl_nb.inventory import acl_data\nsys.exit(acl_data())\n")        # what pip makes of settings.ini
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
            Image.new("RGB", (16, 16)).save(path, "JPEG")

BAD = {
    "unknown action": (["fech"], "unknown action 'fech': did you mean fetch?"),
    "nothing to fetch": (["fetch"], "`name` must be given: fetch takes one of imagenet_lt, places_lt"),
    "no such benchmark": (["fetch", "imagenetlt"], "unknown benchmark 'imagenetlt': did you mean imagenet_lt?"),
    "no such data set": (["check", "digts_lt"], "unknown data set 'digts_lt': did you mean digits_lt"),
    "no lists": (["check", "places_lt"], "Places_LT_train.txt not found in data: `acl_data fetch places_lt --data data` puts it there"),
    "no server": (["fetch", "places_lt", "--base", "http://127.0.0.1:1"], "cannot be fetched"),
    "no folder tree": (["check", "folder_lt", "--data", "nowhere"], "must be a folder with one folder of images per class"),
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

def photographs(root):
    "As `images`, larger than they are packed; one lies on its side."
    for content in LISTS.values():
        for line in content.decode().splitlines():
            path, turned = root/line.split()[0], Image.Exif()
            if path.name == "3.jpg": turned[274] = 6
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(int(path.stem)).integers(0, 256, (5, 7, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((140, 100), Image.Resampling.BICUBIC).save(path, "JPEG", exif=turned)

def test_pack_then_the_same_images_are_read(tiny, tmp_path, monkeypatch, capsys):
    base, shipped = tiny
    data, packed = tmp_path/"data", tmp_path/"packed"
    run(["fetch", "imagenet_lt", "--data", data, "--base", base], monkeypatch, capsys)
    pack = ["pack", "imagenet_lt", "--data", data, "--out", packed, "--side", 64]
    code, out, err = run(pack, monkeypatch, capsys)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "missing: train/a/1.jpg" in err and not packed.exists()
    photographs(data)
    code, out, err = run(pack, monkeypatch, capsys)
    assert code == 0 and "7 images, " in out and f"--data {packed}" in out
    code, out, err = run(["check", "imagenet_lt", "--data", packed, "--decode"], monkeypatch, capsys)
    assert (code, err) == (0, "") and "imagenet_lt val: 2 images, 2 classes, every file there and readable" in out
    for split in ("test", "val"):
        loose, small = (imagenet_lt(folder, split=split, size=32) for folder in (data, packed))
        told, of_loose = small.describe(), loose.describe()
        del of_loose["sizes_sha256"]
        assert told.pop("packed")["side"] == 64 and told == of_loose
        for a, b in ((loose.train, small.train), (loose.test, small.test)):
            found, wanted = (part.__getitems__(range(len(part))) for part in (b, a))
            assert torch.equal(found[1], wanted[1]) and torch.equal(a.notes, b.notes)
            assert (found[0].int() - wanted[0].int()).abs().float().mean() < 3
    assert small.train.counted() == {"turned": 1} and small.train.skipped == []
    loader = DataLoader(small.train, 2, num_workers=2, collate_fn=list, multiprocessing_context="spawn")
    assert torch.equal(torch.cat([labels for _, labels, _ in loader]), small.train.labels)

PACKED_BADLY = {     # words of the command line -> what is said
    "check places_lt --data packed": "packed must be packed from places_lt; got imagenet_lt",
    "check folder_lt --data packed": "packed must be packed from a tree of folders; got the lists of imagenet_lt",
    "pack imagenet_lt --out packed": "packed must be a new folder; got one that is packed already",
    "pack imagenet_lt --data packed": "packed must hold the images themselves; got a packed folder",
    "pack imagenet_lt --out data": "data must be a new or an empty folder",
    "pack digits_lt": "a data set to pack must lie in files: imagenet_lt, ",
    "pack": "`name` must be given: pack takes ",
    "pack imagenet_lt --side 0": "`side` must be at least 1 pixel; got 0",
}

def test_what_a_pack_refuses_is_one_line_and_exit_2(tiny, tmp_path, monkeypatch, capsys):
    base, shipped = tiny
    monkeypatch.chdir(tmp_path)
    run(["fetch", "imagenet_lt", "--base", base], monkeypatch, capsys)
    images(tmp_path/"data")
    run(["pack", "imagenet_lt", "--out", "packed"], monkeypatch, capsys)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words, said in PACKED_BADLY.items():
        code, out, err = run(words.split(), monkeypatch, capsys)
        assert (code, out, err.count("\n")) == (2, "", 1) and said in err, (words, err)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    tar = tmp_path/"packed/images-000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])                # as an interrupted copy leaves it
    code, out, err = run(["check", "imagenet_lt", "--data", "packed"], monkeypatch, capsys)
    assert code == 2 and err.count("\n") == 1 and "images-000.tar must have " in err

def test_a_killed_pack_goes_on(tiny, tmp_path):
    base, shipped = tiny
    fetch_lists("imagenet_lt", tmp_path/"data", base)
    photographs(tmp_path/"data")
    def pack(out, *changes):
        "In a process of its own, two images per file."
        setting = {"classes": 2, "parts": BENCHMARKS["imagenet_lt"].parts, "blobs": BENCHMARKS["imagenet_lt"].blobs}
        lines = ["import os, signal", "from dataclasses import replace", "from acl_nb.datasets import packed",
                 f"packed.BENCHMARKS['imagenet_lt'] = replace(packed.BENCHMARKS['imagenet_lt'], **{setting})",
                 "packed.PER_FILE = 2", *changes,
                 f"packed.pack_images('imagenet_lt', 'data', {out!r}, packed.PackSettings(64), workers=1)"]
        (tmp_path/"go.py").write_text("\n".join(lines))
        return program(tmp_path/"go.py", cwd=tmp_path).returncode
    dies = ["really, done = packed.packed_image, []",
            "def dying(*a):",
            "    done.append(1)",
            "    if len(done) > 3: os.kill(os.getpid(), signal.SIGKILL)",
            "    return really(*a)",
            "packed.packed_image = dying"]
    assert pack("killed", *dies) == -9 and not (tmp_path/"killed/pack.json").exists()
    with pytest.raises(BadInput, match="train/a/1.jpg|ImageNet_LT_train.txt not found"): imagenet_lt(tmp_path/"killed")
    first = (tmp_path/"killed/images-000.tar").stat().st_mtime_ns
    assert pack("killed") == 0 == pack("whole") and (tmp_path/"killed/images-000.tar").stat().st_mtime_ns == first
    names = sorted(path.name for path in (tmp_path/"whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path/"killed").iterdir()) and len(names) == 6
    for name in set(names) - {"index.npz"}:
        assert (tmp_path/"whole"/name).read_bytes() == (tmp_path/"killed"/name).read_bytes()

def test_a_list_that_is_not_the_published_one_changes_nothing(tiny, tmp_path, monkeypatch, capsys):
    base, shipped = tiny
    (tmp_path/"ImageNet_LT_train.txt").write_text("mine")
    (shipped/"ImageNet_LT_train.txt").write_text("another")
    monkeypatch.setenv("ACL_LISTS_URL", base)
    code, out, err = run(["fetch", "imagenet_lt", "--data", tmp_path], monkeypatch, capsys)
    assert code == 2 and err.count("\n") == 1 and "must be the published list" in err and "the file that was there is kept" in err
    assert (tmp_path/"ImageNet_LT_train.txt").read_text() == "mine" and not list(tmp_path.glob("*.part"))

def test_a_fresh_process_ends_with_2_and_no_traceback(tmp_path):
    code = "import sys; sys.argv[0] = 'acl_data'; from acl_nb.inventory import acl_data; acl_data()"
    (tmp_path/"go.py").write_text(code)
    r = subprocess.run([sys.executable, "go.py", "fech"], cwd=tmp_path, capture_output=True, text=True)
    assert (r.returncode, r.stdout, r.stderr) == (2, "", "error: unknown action 'fech': did you mean fetch?\n")

NOISE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE).resize((70, 50), Image.Resampling.BICUBIC)
UPRIGHT = torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1)

@pytest.fixture(params=decoders.available_decoders())
def forced(request, monkeypatch):
    "The environment variable names one of the decoders that work here."
    monkeypatch.setenv("ACL_NB_DECODER", request.param)
    decoders.image_decoder.cache_clear()
    yield request.param
    decoders.image_decoder.cache_clear()

def saved(path, image, **options):
    image.save(path, **options)
    return path

def stored(orientation):
    "PHOTO as a camera stores it that is held in one of the eight ways, by pillow's own turns undone."
    turn = Image.Transpose
    undo = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
            6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    exif = Image.Exif()
    exif[274] = orientation
    return PHOTO.transpose(undo[orientation]) if orientation in undo else PHOTO, exif

@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_comes_upright(forced, orientation, tmp_path):
    image, exif = stored(orientation)
    assert torch.equal(read_image(saved(tmp_path/"a.png", image, exif=exif)), UPRIGHT)
    assert torch.equal(read_image(saved(tmp_path/"a.webp", image, exif=exif, lossless=True)), UPRIGHT)
    jpeg = read_image(saved(tmp_path/"a.jpg", image, exif=exif, quality=100, subsampling=0))
    assert jpeg.shape == UPRIGHT.shape and (jpeg.int() - UPRIGHT.int()).abs().max() <= 4

def test_a_turn_is_noted_wherever_the_exif_block_stands(forced):
    image, exif = stored(6)
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, quality=100, subsampling=0)
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)               # a long comment before the block
    for data in (file.getvalue(), file.getvalue()[:2] + comment + file.getvalue()[2:]):
        pixels, notes = decoders.decode_noting(data)
        assert pixels.shape == UPRIGHT.shape and notes == decoders.Note.TURNED

def test_a_wrong_decoder_is_told_and_no_file_is_blamed():
    file = io.BytesIO()
    PHOTO.save(file, "JPEG")
    with pytest.raises(BadInput, match="`decoder` must be one that works here; got 'pilow'"):
        decoders.decode(file.getvalue(), "photo.jpg", "pilow")

def test_a_damaged_exif_block_turns_nothing(forced, tmp_path):
    for name in ("a.png", "a.webp"):
        assert torch.equal(read_image(saved(tmp_path/name, PHOTO, exif=b"Exif\0\0nonsense", lossless=True)), UPRIGHT)
    assert read_image(saved(tmp_path/"a.jpg", PHOTO, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).shape == UPRIGHT.shape

def test_every_mode_becomes_the_rgb_that_pillow_makes(forced, tmp_path):
    grey = PHOTO.convert("L")
    lossless = {"1": PHOTO.convert("1"), "L": grey, "P": PHOTO.quantize(7), "RGB": PHOTO}
    for mode, image in lossless.items():
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(read_image(saved(tmp_path/f"{mode}.png", image)), expected), mode
    for mode in ("L", "P"):
        expected = torch.from_numpy(np.array(lossless[mode].convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(read_image(saved(tmp_path/f"{mode}.gif", lossless[mode])), expected), mode
    for mode in ("L", "RGB", "CMYK"):
        path = saved(tmp_path/f"{mode}.jpg", PHOTO.convert(mode))
        expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        assert (read_image(path).int() - expected.int()).abs().max() <= 2, mode
        assert read_image(path, size=32).shape == (3, 32, 32)

def test_what_is_transparent_stands_on_the_background(forced, tmp_path):
    image = Image.new("P", (3, 1), 1)
    image.putpalette([9, 8, 7, 1, 2, 3, 90, 80, 70])
    image.putpixel((2, 0), 2)
    ground = {"white": [255] * 3, "black": [0] * 3, "#102030": [16, 32, 48]}
    for kind in ("gif", "png"):
        path = saved(tmp_path/f"a.{kind}", image, transparency=2, optimize=False)
        for name, colour in ground.items():
            pixels, notes = decoders.decode_noting(path.read_bytes(), background=name)
            assert pixels[:, 0].T.tolist() == [[1, 2, 3], [1, 2, 3], colour] and notes == decoders.Note.TRANSPARENT
    grey = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.new("L", (2, 1), 51)])    # a fifth of it is there
    for mode in ("LA", "RGBA"):
        path = saved(tmp_path/f"{mode}.png", grey.convert(mode))
        assert read_image(path).unique().tolist() == [224]                                 # .2 · 100 + .8 · 255
    with pytest.raises(BadInput, match="`background` must be a colour, such as white, black or #808080; got 'sky'"):
        decoders.decode(path.read_bytes(), background="sky")

def test_sixteen_bits_are_scaled_and_not_clipped(forced, tmp_path):
    ramp = np.linspace(0, 65_535, 600).astype(np.uint16).reshape(20, 30)
    for kind in ("png", "tif"):
        pixels = read_image(saved(tmp_path/f"deep.{kind}", Image.fromarray(ramp)))
        assert torch.equal(pixels, torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, -1, -1))
    deep_colour = tmp_path/"colour.png"
    deep_colour.write_bytes(png_of_sixteen_bits(np.stack([ramp, ramp.T.reshape(20, 30), 65_535 - ramp], 2)))
    pixels, notes = decoders.decode_noting(deep_colour.read_bytes())
    assert notes == decoders.Note.DEEP
    assert torch.equal(pixels[0], torch.from_numpy((ramp >> 8).astype(np.uint8)))

def png_of_sixteen_bits(colour):
    "The bytes of a PNG file of uint16 [H, W, 3]; pillow writes none."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    height, width, _ = colour.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

def test_of_a_moving_picture_the_first_frame_is_taken(forced, tmp_path):
    frames = {"save_all": True, "append_images": [PHOTO.rotate(90)]}
    for kind, more in {"gif": {}, "webp": {"lossless": True}, "png": {}, "tif": {}}.items():
        moving, still = (saved(tmp_path/f"{name}.{kind}", PHOTO, **more, **options).read_bytes()
                         for name, options in (("moving", frames), ("still", {})))
        pixels, notes = decoders.decode_noting(moving)
        assert torch.equal(pixels, decoders.decode(still)) and notes == decoders.Note.ANIMATED, kind

def test_what_no_decoder_reads(forced, tmp_path):
    def data_of(name, image, **options): return saved(tmp_path/name, image, **options).read_bytes()
    neither = "must be a readable image: it is neither JPEG, PNG, GIF, WebP, BMP nor TIFF"
    no_white = "must be a picture of 8 or 16 bits per channel (which value would be white?); got "
    cases = {
        "cut.jpg": (data_of("a.jpg", PHOTO)[:-30], "truncated"),
        "half.png": (data_of("b.png", PHOTO)[:60], "must be a readable image: "),
        "float.tif": (data_of("c.tif", Image.new("F", (4, 4))), no_white + "floats"),
        "int.tif": (data_of("d.tif", Image.new("I", (4, 4))), no_white + "whole numbers of 32 bits"),
        "none.ppm": (data_of("f.ppm", PHOTO), neither),
        "text.jpg": (b"<html>404</html>", neither),
        "empty.jpg": (b"", "must be a readable image: it is empty"),
    }
    for name, (data, said) in cases.items():
        (tmp_path/name).write_bytes(data)
        with pytest.raises(BadInput) as refused: read_image(tmp_path/name)
        message = str(refused.value)
        assert message.startswith(f"{tmp_path/name} must be") and said in message
        assert "\n" not in message and "cpp" not in message
    with pytest.raises(BadInput, match="gone.jpg must be a readable image: .*No such file"):
        read_image(tmp_path/"gone.jpg")

FUZZ = int(os.environ.get("ACL_FUZZ", 50))     # damaged files of each format; 500 for a longer look

def damaged(data, draw):
    "A file cut somewhere, or with bytes changed, or with a piece left out."
    kind, place = draw.integers(3), draw.integers(0, len(data))
    if kind == 0: return data[:place]
    if kind == 1: return data[:place] + data[place + draw.integers(1, 20):]
    changed = bytearray(data)
    for at in draw.integers(0, len(data), draw.integers(1, 6)): changed[at] = draw.integers(0, 256)
    return bytes(changed)

FUZZED = """import sys, warnings
from pathlib import Path
from acl_nb.checks import BadInput
from acl_nb.datasets.decoders import available_decoders, decode
warnings.simplefilter("ignore")
for path in sorted(Path(sys.argv[1]).iterdir()):
    for decoder in available_decoders() if path.suffix == ".jpg" else ["pillow"]:
        print(path.name, decoder, end=" ", flush=True)      # the last one printed has ended the process
        try: print("black" if not decode(path.read_bytes(), path, decoder).any() else "read")
        except BadInput as e: print("refused" if str(path) in str(e) and "\\n" not in str(e) else f"said badly: {e}")
"""

def whole_files():
    "(ending, bytes) of sound files, several kinds of each format."
    large = PHOTO.resize((210, 150), Image.Resampling.BICUBIC)
    grey = large.convert("L")
    kinds = {"jpg": [(large, {}), (grey, {}), (large, {"progressive": True}), (large.convert("CMYK"), {})],
             "png": [(large, {}), (grey, {}), (large.convert("RGBA"), {}), (large.quantize(9), {})],
             "gif": [(large, {}), (grey, {})], "bmp": [(large, {}), (grey, {})],
             "webp": [(large, {}), (large, {"lossless": True})],
             "tif": [(large, {"compression": how}) for how in (None, "tiff_lzw", "tiff_deflate", "jpeg")]}
    names = {"jpg": "JPEG", "tif": "TIFF"}
    for ending, pictures in kinds.items():
        for picture, options in pictures:
            file = io.BytesIO()
            picture.save(file, names.get(ending, ending), **options)
            yield ending, file.getvalue()

def test_a_damaged_file_is_refused_or_read_and_ends_nothing(tmp_path):
    draw = np.random.default_rng(int(os.environ.get("ACL_FUZZ_SEED", 0)))
    whole = list(whole_files())
    for ending in {ending for ending, _ in whole}:
        files = [data for e, data in whole if e == ending]
        for k in range(FUZZ): (tmp_path/f"{k:04}.{ending}").write_bytes(damaged(files[k % len(files)], draw))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    r = subprocess.run([sys.executable, "-c", FUZZED, tmp_path], capture_output=True, text=True, env=env, timeout=900)
    said = [line.split(" ", 2) for line in r.stdout.splitlines()]
    assert r.returncode == 0, f"ended by {said[-1]}, exit code {r.returncode}"
    assert not [line for line in said if line[2] not in ("read", "refused")]
    refused = {name[-3:] for name, _, end in said if end == "refused"}
    assert len({name for name, *_ in said}) == 6 * FUZZ and refused == {"jpg", "png", "gif", "bmp", "ebp", "tif"}

def test_no_warning_of_a_decoder_reaches_the_user(forced, tmp_path):
    saved(tmp_path/"a.jpg", PHOTO)
    code = "from acl_nb.datasets.files import read_image; print([list(read_image('a.jpg').shape) for _ in range(2)])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for strict in ("always", "error:The image decoding"):
        command = [sys.executable, "-W", strict, "-c", code]
        r = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
        assert (r.returncode, r.stdout) == (0, "[[3, 50, 70], [3, 50, 70]]\n") and "decoding" not in r.stderr

def test_only_one_module_knows_the_deprecated_decoders():
    package = Path(decoders.__file__).parents[1]
    assert [p.name for p in package.rglob("*.py") if "torchvision.io" in p.read_text(encoding="utf-8")] == ["decoders.py"]

def test_a_decoder_that_is_not_there_is_refused_and_no_file_blamed(tmp_path, monkeypatch):
    (tmp_path/"train/emu").mkdir(parents=True)
    saved(tmp_path/"train/emu/1.jpg", PHOTO)
    index = read_folder(tmp_path, "train")
    def missing(): raise OSError("libwebp.so.7: cannot open shared object file")
    monkeypatch.setitem(decoders.DECODERS, "missing", missing)
    refusals = {"opencv": "must be one of torchcodec, torchvision, pillow",
                "missing": "`ACL_NB_DECODER=missing` needs missing's image decoders"}
    uses = (lambda: ImageFiles(index, tmp_path, on_error="skip"), lambda: check_files(index, tmp_path, decode=True),
            lambda: read_image(tmp_path/"train/emu/1.jpg"))
    for name, said in refusals.items():
        monkeypatch.setenv("ACL_NB_DECODER", name)
        decoders.image_decoder.cache_clear()
        for use in uses:
            with pytest.raises(BadInput) as refused: use()
            assert said in str(refused.value) and "1.jpg" not in str(refused.value)
    decoders.image_decoder.cache_clear()

def test_the_first_decoder_that_works_is_taken(monkeypatch):
    def missing(): raise ImportError("no module of this name")
    monkeypatch.delenv("ACL_NB_DECODER", raising=False)
    monkeypatch.setattr(decoders, "DECODERS", {"missing": missing, **decoders.DECODERS})
    decoders.image_decoder.cache_clear()
    first = decoders.available_decoders()[0]
    assert decoders.image_decoder() == first != "missing"
    decoders.image_decoder.cache_clear()

def test_emoji_without_npm_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: None)
    code, out, err = run(["emoji"], monkeypatch, capsys)
    assert (code, out, err.count("\n")) == (2, "", 1) and "npm must be installed to fetch the emoji" in err
    (tmp_path/"packages").mkdir()
    (tmp_path/"packages/emoji-datasource-google-16.0.0.tgz").write_bytes(b"another file")
    code, out, err = run(["emoji", "--packages", "packages"], monkeypatch, capsys)
    assert (code, out, err.count("\n")) == (2, "", 1) and "must be the published package" in err
    assert not list((tmp_path/"data").iterdir())
