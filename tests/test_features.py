"Features stored once: they are the encoder's own, a run on them is the run of a frozen encoder, and the heads go back."
import json
import os
from dataclasses import asdict, replace

import pytest
import torch

import acl_nb.features
from acl_nb.build import build
from acl_nb.compare import acl_compare
from acl_nb.evaluation import acl_eval
from acl_nb.datasets.stored import features, read_features
from acl_nb.features import acl_features, features_recipe, join_run, store_features
from acl_nb.loop import Training
from acl_nb.losses import LOSSES, TRAITS
from acl_nb.models import load_model
from acl_nb.predict import Predictor, acl_predict
from acl_nb.recipes import recipe
from acl_nb.settings import Recipe
from acl_nb.trainer import fit
from ranks import program

ENCODER = recipe("digits_lt", encoder="resnet8_tiny", freeze="all", n_max=60, precision="fp32", epochs=2, seed=3)

@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("features")/"digits.safetensors"
    assert store_features(ENCODER, path, views=5)
    return path

@pytest.fixture(scope="module")
def run(stored):
    return fit(features_recipe(stored), stored.parent/"run", quiet=True)

def test_the_features_are_those_of_the_same_views(stored):
    arrays, told = read_features(stored, encoder=True)
    parts = build(ENCODER)
    parts.bare.eval()
    n = len(parts.data.train)
    views = torch.cat([parts.views(parts.data.train.images, torch.arange(n), epoch) for epoch in (0, 1)], 1)[:, :5]
    with torch.inference_mode():
        wanted = parts.bare.features(views.flatten(0, 1)).unflatten(0, (n, 5))
        plain, test = (parts.bare.features(parts.plain(part.images)[:, 0]) for part in (parts.data.train, parts.data.test))
    for name, values in dict(train=wanted, train_plain=plain, test=test).items():
        torch.testing.assert_close(arrays[name], values, rtol=1e-5, atol=1e-6)
    assert arrays["train_labels"].equal(parts.data.train.labels) and arrays["test_labels"].equal(parts.data.test.labels)
    for name, weight in parts.bare.encoder.state_dict().items(): assert arrays[f"encoder.{name}"].equal(weight), name
    assert told["data"] == parts.data.describe() and told["classes"] == parts.data.classes
    assert not {"data", "encoder_weights"} & set(told["recipe"]) and str(stored.parent) not in json.dumps(told)

def epoch_losses(run):
    "The loss of each step of an epoch."
    losses = []
    for batches in run.steps_left():
        run.train_step(batches)
        losses.append(run.values)
    return torch.tensor(losses)

@pytest.mark.parametrize("loss, readout", [("acl", "classifier"), ("scl", "centers"), ("paco", "classifier")])
def test_a_run_on_features_is_the_run_of_the_frozen_encoder(tmp_path, loss, readout):
    settings = asdict(replace(ENCODER, policy="plain", views=2)) | TRAITS[loss].usual | dict(loss=loss, readout=readout, views=2)
    of_images = Recipe(**settings)
    store_features(of_images, tmp_path/"plain.safetensors", views=2)
    images, vectors = Training(build(of_images)), Training(build(features_recipe(tmp_path/"plain.safetensors")))
    heads = {k: v for k, v in images.parts.bare.state_dict().items() if not k.startswith("encoder.")}
    vectors.parts.bare.load_state_dict(heads)               # their random numbers come after an encoder's
    if images.parts.keys.copy is not None: vectors.parts.keys.copy.module.load_state_dict(heads)
    torch.testing.assert_close(epoch_losses(vectors), epoch_losses(images), rtol=1e-5, atol=1e-5)
    for name, weight in vectors.parts.bare.named_parameters():
        torch.testing.assert_close(weight, images.parts.bare.get_parameter(name), rtol=1e-3, atol=1e-4)

class Killed(BaseException):
    "What a process does not survive."

def test_a_killed_command_goes_on_and_gives_the_same_bytes(stored, tmp_path, monkeypatch):
    path, written, write = tmp_path/"again.safetensors", [], acl_nb.features.write_bytes
    def dies(target, data):
        if len(written) == 4: raise Killed
        written.append(target)
        write(target, data)
    monkeypatch.setattr(acl_nb.features, "write_bytes", dies)
    with pytest.raises(Killed): store_features(ENCODER, path, views=5)
    parts = path.with_name("again.safetensors.parts")
    ages = {p: (parts/p).stat().st_mtime_ns for p in os.listdir(parts) if p.endswith(".safetensors")}
    assert len(ages) == 4 and not path.exists()
    with pytest.raises(ValueError, match="parts of other features .seed is 3 there, 4 here"):
        store_features(replace(ENCODER, seed=4), path, views=5)
    kept = {}
    def notes(target, data):
        kept.update({p: (parts/p).stat().st_mtime_ns for p in ages})
        write(target, data)
    monkeypatch.setattr(acl_nb.features, "write_bytes", notes)
    assert store_features(ENCODER, path, views=5)
    assert kept == ages and path.read_bytes() == stored.read_bytes() and not parts.exists()

def test_a_run_on_features_goes_on_bit_by_bit(stored, run):
    class Stop:
        def after_step(self, training):
            if training.step == 4: raise KeyboardInterrupt
    out = stored.parent/"cut"
    with pytest.raises(KeyboardInterrupt): fit(run_recipe(run), out, quiet=True, callbacks=[Stop()], save_every=0)
    again = fit(run_recipe(run), out, "must", quiet=True)
    files = [(r.path/"model.safetensors").read_bytes() for r in (run, again)]
    assert files[0] == files[1] and run.history[-1]["loss"] == again.history[-1]["loss"]

def run_recipe(run): return Recipe(**run.recipe)

@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_on_features(stored, tmp_path, loss):
    settings = asdict(features_recipe(stored)) | TRAITS[loss].usual | dict(loss=loss, epochs=1)
    done = fit(Recipe(**settings), tmp_path/loss, quiet=True)
    assert done.finished and 0 < done.summary["top1"] <= 1 and done.env["data"]["images"] == "digits_lt"

@pytest.mark.parametrize("settings", [dict(readout="centers"), dict(readout="centers", centers="none", loss="scl"),
                                      dict(classifier="cosine", classifier_init="means"), dict(centers="free", ema=0.9)])
def test_every_way_to_predict(stored, tmp_path, settings):
    assert fit(replace(features_recipe(stored), **settings), tmp_path/"run", quiet=True).finished

def test_what_comes_out_is_judged_as_ever(run, capsys):
    acl_eval(str(run.path))
    assert "summary.json: the same numbers, exactly" in capsys.readouterr().out
    acl_eval(str(run.path), split="train", tau=1.0)
    assert "split train" in capsys.readouterr().out
    other = fit(replace(run_recipe(run), loss="la", seed=1), run.path.parent/"la", quiet=True)
    acl_compare([str(run.path), str(other.path)])
    assert "loss" in capsys.readouterr().out
    assert set(run.figures()) >= {"curves", "counts", "per_class", "confusion"}

def test_joined_heads_predict_what_the_run_recorded(run, stored, tmp_path):
    path = tmp_path/"model.safetensors"
    join_run(run.path, path)
    data = build(ENCODER).data
    said = Predictor(path).of_pixels(data.test.images, top=1)
    assert said.classes[:, 0].int().equal(run.predictions["predicted"])
    torch.testing.assert_close(said.probabilities[:, 0], run.predictions["confidence"], rtol=1e-4, atol=1e-5)
    facts = load_model(path).facts
    assert Recipe(**facts.recipe).encoder == "resnet8_tiny" and facts.data["sha256"] == data.describe()["sha256"]
    assert facts.counts == data.counts.tolist() and str(stored) not in json.dumps(vars(facts))

def test_half_the_precision_halves_the_file(stored, tmp_path):
    store_features(ENCODER, tmp_path/"half.safetensors", 5, "float16")
    whole, half = (read_features(path)[0]["train"] for path in (stored, tmp_path/"half.safetensors"))
    assert half.dtype == torch.float16 and half.equal(whole.half())
    assert features(tmp_path/"half.safetensors").train[0][0].dtype == torch.float32

def test_broken_files_are_left_out(tmp_path):
    from PIL import Image
    for part, n in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path/part/name).mkdir(parents=True)
            for i in range(n): Image.new("RGB", (12, 12), (40 * i, 90, 7)).save(tmp_path/part/name/f"{i}.png")
    (tmp_path/"train"/"cat"/"2.png").write_bytes(b"no picture")
    r = Recipe(dataset="folder_lt", data=str(tmp_path), imbalance="as_is", on_error="skip", size=8, epochs=1,
               encoder="resnet8_tiny", precision="fp32", batch_size=4)
    store_features(r, tmp_path/"f.safetensors", 4, workers=0)
    assert features(tmp_path/"f.safetensors").counts.tolist() == [5, 6]
    assert fit(features_recipe(tmp_path/"f.safetensors"), tmp_path/"run", quiet=True).finished

def refused(capsys, f, *args, **kwargs):
    "The one line that a command says."
    with pytest.raises(SystemExit) as exit: f(*args, **kwargs)
    shown = capsys.readouterr()
    assert exit.value.code == 2 and shown.err.count("\n") == 1 and shown.err.startswith("error: "), shown
    return shown.err

BAD = {
    "no file": (dict(), "--out must name a file that ends in .safetensors; got none"),
    "another ending": (dict(out="f.npz"), "got f.npz"),
    "no view": (dict(out="f.safetensors", views=0), "`views` must be at least 1; got 0"),
    "another type": (dict(out="f.safetensors", dtype="int8"), "unknown dtype 'int8'"),
    "no recipe": (dict(name="digts_lt", out="f.safetensors"), "unknown recipe 'digts_lt'"),
    "features of features": (dict(out="f.safetensors", set=["dataset=features", "imbalance=as_is", "encoder=none", "policy=plain"]),
                             "features of features can't be made"),
    "both": (dict(out="f.safetensors", join="runs/x", views=3), "--join takes a run"),
    "no run": (dict(out="f.safetensors", join="runs/x"), "a run folder must hold recipe.json"),
}

@pytest.mark.parametrize("case", BAD)
def test_a_bad_wish_is_one_sentence(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options, said = BAD[case]
    assert said in refused(capsys, acl_features, **options)
    assert os.listdir(tmp_path) == []

FIELDS = {"policy": "digits", "size": 8, "encoder": "resnet8", "freeze": "all", "encoder_lr": 0.1}

@pytest.mark.parametrize("field", FIELDS)
def test_settings_of_an_encoder_are_refused_for_features(stored, field):
    with pytest.raises(ValueError, match=f"`{field}` must "): replace(features_recipe(stored), **{field: FIELDS[field]})

def test_more_views_than_are_stored_are_refused(stored):
    with pytest.raises(ValueError, match="no more than 5 views by digits"): build(replace(features_recipe(stored), views=6))

def test_another_file_is_left_alone(stored, capsys):
    before = stored.read_bytes()
    said = refused(capsys, acl_features, "digits_lt", out=str(stored), views=5)
    assert "must not hold other features" in said and stored.read_bytes() == before

def test_heads_alone_and_another_runs_heads_are_refused(run, stored, tmp_path, capsys):
    said = refused(capsys, acl_predict, str(run.path), ["x.png"])
    assert "must hold an encoder, it has heads for stored features alone: `acl_features --join RUN" in said
    store_features(replace(ENCODER, seed=4), tmp_path/"other.safetensors", 5)
    said = refused(capsys, acl_features, join=str(run.path), out=str(tmp_path/"m.safetensors"), data=str(tmp_path/"other.safetensors"))
    assert "must hold the features that" in said and not (tmp_path/"m.safetensors").exists()

def test_the_command_line_from_images_to_a_model(tmp_path):
    def started(command, *words):
        code = f"from acl_nb.{'features' if command == 'acl_features' else 'cli'} import {command}\n{command}()\n"
        (tmp_path/f"{command}.py").write_text(code)
        done = program(tmp_path/f"{command}.py", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout
    said = started("acl_features", "digits_lt", "--out", "f.safetensors", "--views", "3", "--set", "encoder=resnet8_tiny", "n_max=40")
    assert "acl_train --recipe f.recipe.json trains heads on them" in said
    assert "report.html" in started("acl_train", "--recipe", "f.recipe.json", "--epochs", "1")
    started("acl_features", "--join", "runs/digits_lt_features-epochs=1", "--out", "m.safetensors")
    assert load_model(tmp_path/"m.safetensors").classes == [str(c) for c in range(10)]
