"With timm and peft installed: encoders and corrections are trained, stopped, gone on with, and used."
import json
import re
import signal
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("peft", reason="peft is not installed")

import acl_nb.encoders
import acl_nb.trainer
from acl_nb.build import build, build_data, build_network
from acl_nb.callbacks import Progress
from acl_nb.checkpoints import load_checkpoint
from acl_nb.cli import acl_train
from acl_nb.encoders import encoder
from acl_nb.evaluation import acl_eval
from acl_nb.finetuning import FREEZE, freeze
from acl_nb.loop import Training
from acl_nb.models import load_model
from acl_nb.predict import acl_predict, export_model
from acl_nb.recipes import read_recipe
from acl_nb.records import Run
from pictures import folder, recipe_file

VIT, EFFICIENTNET = "timm/vit_tiny_patch16_224", "timm/tf_efficientnet_lite0"
SMALL = dict(encoder=VIT, size=32, optimizer="adamw", lr=1e-3, precision="fp32", epochs=2)
TUNED = SMALL | dict(batch_size=32, classes=4, loss="acl",
                     lora=4, layer_decay=0.75, drop_path=0.1, mixup=0.2)

@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "The recipe of a ViT that is fine-tuned by many means at once, on pictures of four classes."
    root = tmp_path_factory.mktemp("tuned")
    return recipe_file(root/"mine.json", folder(root/"pictures"), **TUNED)

def train(file, out, **settings):
    "acl_train, as a shell calls it."
    pairs = [f"{field}={value}" for field, value in settings.items()]
    acl_train(recipe=str(file), out=str(out), workers=0, set=pairs)
    return Run(out)

@pytest.fixture(scope="module")
def run(file): return train(file, file.parent/"run")

def begun(file, **settings):
    "The parts of a recipe before the first step."
    return build(replace(read_recipe(file), **settings), workers=0)

def test_corrections_and_heads_move_and_nothing_else(file, run):
    first, last = (row["loss"] for row in run.history)
    assert 0 < last < first < float("inf")
    before = begun(file).bare.state_dict()
    after = load_checkpoint(run.path/"checkpoint").learnt["network"]
    moved = {name for name, value in before.items() if not after[name].equal(value)}
    corrections = {name for name in before if ".lora_" in name}
    assert len(corrections) == 2 * 4 * 12       # A and B of four matrices in twelve blocks
    assert moved == corrections | {name for name in before if not name.startswith("encoder.")}

class StopAfterOne(Progress):
    "Ctrl-C after the first epoch."
    def after_epoch(self, run):
        super().after_epoch(run)
        if run.epoch == 1: signal.raise_signal(signal.SIGINT)

def content(run):
    "What two runs of a recipe have in common."
    rows = [row | {"seconds": None} for row in run.history]
    return rows, (run.path/"model.safetensors").read_bytes()

def test_it_is_stopped_and_goes_on_bit_by_bit(file, run, monkeypatch, capsys):
    cut = file.parent/"cut"
    with monkeypatch.context() as patch:
        patch.setattr(acl_nb.trainer, "Progress", StopAfterOne)
        with pytest.raises(SystemExit) as exit: train(file, cut)
    assert exit.value.code == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert len(Run(cut).history) == 1 and not Run(cut).finished
    assert content(train(file, cut)) == content(run)

def test_what_is_printed_names_corrections_and_rates(file, capsys):
    acl_train(recipe=str(file), print=True)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["lora"] == 4
    begin, *said = shown.err.splitlines()
    assert begin.startswith(f"{VIT} begins with random weights")
    assert said[:2] == ["LoRA: its weights stay, each matrix learns a correction of rank 4",
                        "layer decay: each layer's rate is 0.75 times that of the next"]
    rates = [line.split()[1] for line in said[3:]]
    stem_blocks_heads = range(1 + 12 + 1)
    assert rates == [f"{0.75 ** (13 - layer):.3g}" for layer in stem_blocks_heads]
    parts = begun(file)
    learnt = sum(p.numel() for p in parts.bare.parameters() if p.requires_grad)
    assert sum(int(line.split()[-1].replace(",", "")) for line in said[3:]) == learnt
    assert [f"{group['lr_scale']:.3g}" for group in parts.optimizer.param_groups] == rates

def test_the_model_needs_no_peft_and_predicts_as_recorded(file, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    network = load_model(run.path/"model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in network.state_dict())
    parts = begun(file, lora=0)
    with torch.inference_mode():
        shown = torch.cat([parts.plain(images)[:, 0] for images, *_ in parts.test_loader])
        probabilities = network.predict(shown).softmax(1)
    recorded = run.predictions
    assert probabilities.argmax(1).equal(recorded["predicted"].long())
    torch.testing.assert_close(probabilities.amax(1), recorded["confidence"], atol=1e-5, rtol=0)
    index, classes = parts.data.test.index, parts.data.classes
    files = [f"{read_recipe(file).data}/{index.path(i)}" for i in range(len(index))]
    capsys.readouterr()
    acl_predict(str(run.path), files, json=True)
    told = [row["top"][0]["class"] for row in json.loads(capsys.readouterr().out)]
    assert told == [classes[k] for k in recorded["predicted"].tolist()]
    graph = torch.export.load(export_model(network, tmp_path/"model.pt2")).module()
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    facts = network.facts
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (facts.mean, facts.std))
    with torch.inference_mode(): wanted = network.predict((pixels / 255 - mean) / std)
    torch.testing.assert_close(graph(pixels), wanted, atol=1e-4, rtol=1e-4)

def test_it_is_evaluated_as_it_was_tested(run, capsys):
    acl_eval(str(run.path))
    assert f"all images {run.summary['top1']:.1%}" in capsys.readouterr().out

@pytest.mark.parametrize("start", ["a file that has gone", "published weights"])
def test_a_run_is_evaluated_without_what_it_began_with(file, tmp_path, monkeypatch, capsys, start):
    published = encoder(VIT, size=32).state_dict()
    save_file(published, tmp_path/"vit.safetensors")
    monkeypatch.setattr(acl_nb.encoders, "_weights_of", lambda name, size: published)
    begins = dict(encoder_weights=tmp_path/"vit.safetensors")
    if start == "published weights": begins = dict(pretrained=True)
    frozen = dict(lora=0, layer_decay="none", drop_path=0, freeze="all")
    run = train(file, tmp_path/"run", epochs=1, **frozen, **begins)
    (tmp_path/"vit.safetensors").unlink()
    monkeypatch.delattr(acl_nb.encoders, "_weights_of")
    capsys.readouterr()
    acl_eval(str(run.path))
    assert f"all images {run.summary['top1']:.1%}" in capsys.readouterr().out
    network = load_model(run.path/"model.safetensors")
    assert network.facts.mean == [0.5] * 3                     # as timm says of this encoder
    for name, value in network.encoder.state_dict().items(): assert value.equal(published[name]), name

NORMS = {VIT: r"(^|\.)norm\d?\.", EFFICIENTNET: r"(^|\.)bn\d\."}      # in the names of parameters
LAST_BLOCK = {VIT: ("blocks.11.", "norm."), EFFICIENTNET: ("blocks.6.0.", "conv_head.", "bn2.")}

@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("how", FREEZE)
def test_what_freezing_leaves(name, how):
    with torch.device("meta"): net = encoder(name)
    freeze(net, how)
    every = {key for key, _ in net.named_parameters()}
    norms = {key for key in every if re.search(NORMS[name], key)}
    last = {key for key in every if key.startswith(LAST_BLOCK[name])}
    assert len(norms) == {VIT: 50, EFFICIENTNET: 98}[name] and last - norms
    wanted = {"none": every, "all": set(), "but_norms": norms, "early": norms | last}[how]
    assert {key for key, p in net.named_parameters() if p.requires_grad} == wanted

def test_frozen_weights_stay_in_training(file):
    run = Training(begun(file, lora=0, freeze="but_norms"))
    before = {name: value.clone() for name, value in run.parts.bare.encoder.named_parameters()}
    run.train_step([next(iter(run.parts.loader))])
    after = dict(run.parts.bare.encoder.named_parameters())
    moved = {name for name, value in before.items() if not after[name].equal(value)}
    assert moved == {name for name in before if re.search(NORMS[VIT], name)}

def test_cutmix_smoothing_and_sampling_in_one_run(file, tmp_path):
    mixed = dict(mixup=0.5, cutmix=1, smoothing=0.1, sampling="class_balanced")
    run = train(file, tmp_path/"run", lora=0, **mixed)
    first, last = (row["loss"] for row in run.history)
    assert 0 < last < first < float("inf")

def one_step(file, **settings):
    "A run after its first step, without anything that is drawn in it."
    plain = dict(drop_path=0., mixup=0., optimizer="sgd", lr=0.05)
    run = Training(begun(file, **plain | settings))
    run.train_step([next(iter(run.parts.loader))])
    return run

def apart(one, other):
    "The largest difference between the gradients of two runs, in units of the largest gradient."
    gradients = []
    for run in (one, other):
        gradients.append([p.grad for p in run.parts.bare.parameters() if p.grad is not None])
    differences = [(a - b).abs().max() for a, b in zip(*gradients, strict=True)]
    return (max(differences) / max(g.abs().max() for g in gradients[0])).item()

def test_sub_batches_give_the_gradients_of_the_whole_batch_and_sam_climbs_first(file):
    "Layer normalisation sees one image at a time, so parts of a batch give what the whole gives."
    whole, parts = one_step(file), one_step(file, sub_batch=8)
    assert apart(whole, parts) < 1e-6
    climbed, in_parts = one_step(file, sam=0.5), one_step(file, sam=0.5, sub_batch=8)
    assert apart(climbed, in_parts) < 1e-6 < 1e-4 < apart(whole, climbed)

def test_timms_optimizers_keep_the_groups_and_take_a_step(file):
    run = one_step(file, optimizer="timm/lamb", decay="weights")
    groups = run.parts.optimizer.param_groups
    decays = [group["weight_decay"] for group in groups]
    assert sorted(decays) == 14 * [0] + 14 * [run.parts.recipe.weight_decay]
    assert all(group["lr"] == run.parts.lr(0) * group["lr_scale"] for group in groups)
    before = begun(file).bare.state_dict()
    assert any(not value.equal(before[name]) for name, value in run.parts.bare.state_dict().items())

UNFIT = [("lambda", "that timm can make"), ("adahessian", "first derivatives")]

@pytest.mark.parametrize("name, said", UNFIT)
def test_an_optimizer_that_cannot_serve_is_one_sentence(file, tmp_path, capsys, name, said):
    with pytest.raises(SystemExit) as exit: train(file, tmp_path/"run", optimizer=f"timm/{name}")
    line = capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1 and said in line and name in line

def test_sam_is_refused_where_a_loss_keeps_what_it_saw(file, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train(file, tmp_path/"run", loss="proco", sam=0.05, sub_batch=8)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1
    assert "`sam` is for losses that keep nothing of past batches" in said

COPYING = {"ema": dict(loss="acl", ema=0.9), "paco": dict(loss="paco", queue=16)}

@pytest.mark.parametrize("settings", COPYING.values(), ids=COPYING)
def test_corrections_where_the_network_has_a_copy(file, tmp_path, capsys, settings):
    of_copies = SMALL | settings | dict(lora=4, epochs=1)
    run = train(recipe_file(tmp_path/"mine.json", read_recipe(file).data, **of_copies), tmp_path/"run")
    assert not any("lora" in name for name in run.network.state_dict())
    acl_eval(str(run.path))
    assert f"all images {run.summary['top1']:.1%}" in capsys.readouterr().out

def efficientnet(file, synchronised):
    r = replace(read_recipe(file), encoder=EFFICIENTNET, lora=0, sync_bn=synchronised)
    return build_network(r, build_data(r)).eval()

def test_synchronised_batch_statistics_keep_the_activations_of_timms_layers(file):
    images = torch.randn(2, 1, 3, 64, 64)
    plain, synchronised = (efficientnet(file, on) for on in (False, True))
    kinds = {type(module).__name__ for module in synchronised.modules()}
    assert {"SyncBatchNormAct", "SyncBatchNorm"} <= kinds
    with torch.inference_mode(): assert plain(images).logits.equal(synchronised(images).logits)
