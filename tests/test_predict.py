"A model in use: the command where nothing but a file is there, input of every kind, and what is refused."
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import hub as stand_in
from acl_nb.checks import BadInput
from acl_nb.models import load_model
from acl_nb.predict import Adjustment, Predictor, acl_predict
from acl_nb.recipes import recipe
from acl_nb.settings import Recipe
from acl_nb.trainer import fit
from ranks import program

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}

def patch(colour, seed, size=(40, 30)):
    "A noisy picture of one colour."
    noise = np.random.RandomState(seed).randint(-20, 21, (*size[::-1], 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))

@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    "A run on a folder of coloured pictures, and nothing left of the folder."
    root = tmp_path_factory.mktemp("colours")
    for part, n in (("train", 12), ("test", 4)):
        for k, name in enumerate(COLOURS):
            (root/"data"/part/name).mkdir(parents=True)
            for i in range(max(2, n - 4 * k)): patch(name, 100 * k + i).save(root/"data"/part/name/f"{i}.png")
    r = Recipe(name="colours", dataset="folder_lt", data=str(root/"data"), imbalance="as_is", size=16, policy="eval",
               encoder="resnet8_tiny", loss="ce", centers="none", epochs=12, batch_size=8, lr=0.02, precision="fp32")
    run = fit(r, root/"run", quiet=True, workers=0)
    assert run.summary["mean_class"] == 1
    (root/"data").rename(root/"gone")
    for path in sorted((root/"gone").rglob("*"), reverse=True): path.rmdir() if path.is_dir() else path.unlink()
    return run

def started(folder, *words, **env):
    "acl_predict in a process of its own, which knows neither this project's folder nor a home."
    script = "import sys; from acl_nb.predict import acl_predict; sys.argv[0] = 'acl_predict'; acl_predict()"
    (folder/"acl_predict.py").write_text(script)
    there = {"HOME": str(folder/"home"), "HF_HUB_DISABLE_TELEMETRY": "1", **env}
    return program(folder/"acl_predict.py", *words, cwd=folder, **there)

def test_a_file_and_a_picture_are_enough(tmp_path, colours):
    (tmp_path/"model.safetensors").write_bytes((colours.path/"model.safetensors").read_bytes())
    patch("green", 7, (90, 61)).save(tmp_path/"what.png")
    done = started(tmp_path, "model.safetensors", "what.png", "--top", 2)
    assert (done.returncode, done.stderr) == (0, "")
    head, row = done.stdout.splitlines()
    assert head.split() == ["image", "class", "then"] and row.split()[:2] == ["what.png", "green"]

def test_one_line_per_unreadable_file_and_exit_1(tmp_path, colours):
    for name in COLOURS: patch(name, 3).save(tmp_path/f"{name}.png")
    (tmp_path/"cut.png").write_bytes((tmp_path/"red.png").read_bytes()[:99])
    (tmp_path/"notes.txt").write_text("no picture")
    done = started(tmp_path, colours.path, ".", "nowhere.png", "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 2
    assert {row["image"]: row["top"][0]["class"] for row in rows} == {f"{name}.png": name for name in COLOURS}

def test_as_csv(tmp_path, colours, capsys):
    patch("blue", 1).save(tmp_path/"b.png")
    acl_predict(colours.path, [str(tmp_path/"b.png")], csv=True, top=1)
    head, row = capsys.readouterr().out.splitlines()
    assert head == "image,class_1,probability_1,nearest_center" and row.split(",")[1] == "blue"

def test_a_grey_image_is_converted_and_said(tmp_path, colours, capsys):
    patch("blue", 1).convert("L").save(tmp_path/"grey.png")
    acl_predict(colours.path, [str(tmp_path/"grey.png")])
    assert "grey images, whose one channel stands for all three of the network: 1" in capsys.readouterr().err

def test_pictures_of_every_kind_give_the_same_name(tmp_path, colours):
    predictor, picture = Predictor(colours.path, "cpu"), patch("red", 5)
    as_tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    said = [predictor(x).names[0][0] for x in (picture, np.array(picture), as_tensor, picture.convert("RGBA"), picture.resize((300, 200)))]
    assert said == ["red"] * 5
    batch = predictor(torch.stack([as_tensor] * 70))
    assert batch.probabilities.shape == (70, 3) and batch.probabilities.std(0).max() < 1e-5

@pytest.mark.parametrize("options, said", [
    (dict(tau=float("nan")), "`tau` must be a number"), (dict(test_prior="uniformly"), "did you mean uniform?"),
    (dict(test_prior="prior.txt"), "frequencies that sum to 1; got 0.9"), (dict(tau=1., test_prior="train"), "give one of them"),
    (dict(top=0), "`top` must be at least 1"), (dict(device="gpu9"), "gpu9"),
], ids=["tau", "unknown prior", "a prior's sum", "two of them", "top", "device"])
def test_wrong_options_are_one_sentence(tmp_path, monkeypatch, capsys, colours, options, said):
    monkeypatch.chdir(tmp_path)
    patch("red", 0).save("r.png")
    (tmp_path/"prior.txt").write_text("0.5 0.3 0.1")
    with pytest.raises(SystemExit) as exit: acl_predict(str(colours.path), ["r.png"], **options)
    shown = capsys.readouterr()
    assert (exit.value.code, shown.out, shown.err.count("\n")) == (2, "", 1) and said in shown.err

def test_a_prior_changes_the_answer(colours):
    grey = Image.new("RGB", (30, 30), (130, 120, 110))
    plain, moved = (Predictor(colours.path, "cpu", Adjustment(prior=prior))(grey) for prior in (None, "inverse"))
    odds = (moved.logits - plain.logits)[0]
    expected = -2 * torch.tensor([4., 8., 12.]).log()       # cross-entropy holds the training's prior
    torch.testing.assert_close(odds - odds[0], expected - expected[0], atol=1e-4, rtol=0)

def test_damaged_models_are_one_sentence(tmp_path, colours):
    whole, draw = (colours.path/"model.safetensors").read_bytes(), random.Random(0)
    length = int.from_bytes(whole[:8], "little")
    path = tmp_path/"model.safetensors"
    for _ in range(60):
        if draw.random() < .3: data = whole[:draw.randrange(len(whole))]
        else:
            data, at = bytearray(whole), draw.randrange(8 + length)
            data[at:at + draw.randrange(1, 9)] = draw.randbytes(draw.randrange(1, 9))
        path.write_bytes(data)
        try: load_model(path)
        except BadInput as e: assert "\n" not in str(e) and str(path) in str(e) or "unknown" in str(e)

def test_a_model_from_the_hub(tmp_path, colours):
    patch("blue", 4).save(tmp_path/"b.png")
    with stand_in.serve() as hub:
        hub.repos["ada/colours"] = {"model.safetensors": (colours.path/"model.safetensors").read_bytes()}
        there = dict(HF_ENDPOINT=hub.address, HF_TOKEN=stand_in.TOKEN, NO_PROXY="127.0.0.1", HF_HOME=str(tmp_path/"hf"))
        done = started(tmp_path, "ada/colours", "b.png", **there)
        assert (done.returncode, done.stdout.split()[4]) == (0, "blue"), done.stderr
        missing = started(tmp_path, "ada/nothing", "b.png", **there)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "the hub could not give it" in missing.stderr
    away = started(tmp_path, "ada/other", "b.png", **there)
    assert away.returncode == 2 and away.stderr.count("\n") == 1

def test_a_mistyped_folder_asks_no_hub(tmp_path, colours):
    (tmp_path/"runs").mkdir()
    done = started(tmp_path, "runs/colour", "b.png", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2 and "a model must be a run folder" in done.stderr and done.stderr.count("\n") == 1

def test_every_recipe_of_digits_can_be_used(tmp_path):
    for loss in ("acl", "paco", "ldam"):
        r = recipe("digits_lt", loss=loss, epochs=1, n_max=20, imbalance=4, dim=8, hidden=8, precision="fp32")
        run = fit(r, tmp_path/loss, quiet=True)
        from acl_nb.datasets import digits_lt
        said = Predictor(run.path, "cpu")(digits_lt().test.images)
        assert torch.equal(said.classes[:, 0].int(), run.predictions["predicted"])
