"Encoders that come trained: what they are fed, what moves, and that a run with them goes on, is saved and predicts."
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from acl_nb.build import build, build_data
from acl_nb.judging import test_network as judged
from acl_nb.loop import Training
from acl_nb.models import describe_model, load_model
from acl_nb.recipes import recipe
from acl_nb.trainer import fit

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)      # CLIP's
CLIP = dict(mean=MEAN, std=STD, input_size=(3, 16, 16), interpolation="bicubic", crop_pct=0.9,
            fixed_input_size=True)

class Recording(nn.Module):
    "Stands for an encoder of timm's; keeps what it is fed."
    num_features = 4

    def __init__(self, name, num_classes, in_chans, pretrained=False, **asked):
        super().__init__()
        self.weight, self.fed = nn.Parameter(torch.ones(4, in_chans)), []

    def forward(self, x):
        self.fed.append(x.detach().clone())
        return x.mean((2, 3)) @ self.weight.T

@pytest.fixture
def timm_of_clip(monkeypatch):
    config = lambda name: SimpleNamespace(to_dict=lambda: CLIP)
    models = SimpleNamespace(get_pretrained_cfg=config)
    stub = SimpleNamespace(create_model=Recording, list_models=lambda: ["clip"], models=models)
    monkeypatch.setitem(sys.modules, "timm", stub)
    monkeypatch.setitem(sys.modules, "timm.models", models)

def fed_with(r):
    "The input of the encoder, and the pixels [B, 1, H, W] it was made of."
    parts = build(r)
    batch = parts.data.train.__getitems__(range(6))
    parts.bare.eval()
    parts.bare.predict(parts.plain(batch[0])[:, 0])
    return parts, parts.bare.encoder.fed[-1], batch[0][:, :1] / 255

def test_a_pretrained_encoder_is_fed_as_it_was(timm_of_clip):
    parts, fed, pixels = fed_with(recipe("digits_lt", encoder="timm/clip", pretrained=True))
    mean, std = (torch.tensor(t)[:, None, None] for t in (MEAN, STD))
    wanted = nn.functional.interpolate((pixels - mean) / std, (16, 16), mode="bicubic")
    assert fed.shape[1:] == (3, 16, 16) and torch.allclose(fed, wanted, atol=1e-5)
    facts = describe_model(vars(parts.recipe), parts.data)
    assert facts.mean == list(MEAN) and facts.size == 8
    assert parts.data.notes["statistics"] == "of the encoder"

@pytest.mark.parametrize("settings", [dict(), dict(pretrained=True, statistics="data")])
def test_the_data_sets_numbers_hold_from_scratch_and_where_they_are_asked_for(timm_of_clip, settings):
    usual = build_data(recipe("digits_lt"))
    parts, fed, pixels = fed_with(recipe("digits_lt", encoder="timm/clip", size=8, **settings))
    assert set(parts.data.mean) == set(usual.mean)
    assert torch.allclose(fed, ((pixels - usual.mean[0]) / usual.std[0]).expand_as(fed), atol=1e-5)

def test_a_classifier_begins_with_the_means_of_the_classes(tmp_path):
    r = recipe("digits_lt", classifier="cosine", classifier_init="means", freeze="all", epochs=1, lr=1e-9)
    begun, random = fit(r, tmp_path/"means", quiet=True), fit(replace(r, classifier_init="random"), tmp_path/"random", quiet=True)
    assert begun.summary["top1"] > random.summary["top1"] + 0.3
    network = load_model(begun.path/"model.safetensors")
    first = build(r).bare
    for name, value in network.encoder.state_dict().items():        # its statistics stay, too
        assert value.equal(first.encoder.state_dict()[name]), name

def test_groups_keep_their_rates_and_a_run_goes_on_bit_by_bit(tmp_path):
    r = recipe("digits_lt", optimizer="adamw", lr=2e-3, decay="weights", weight_decay=0.05, layer_decay=0.7,
               epochs=3, n_max=40, precision="fp32")
    whole = fit(r, tmp_path/"whole", quiet=True)
    class Stop:
        def after_epoch(self, run):
            if run.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(r, tmp_path/"cut", quiet=True, callbacks=[Stop()], save_every=0)
    rates = []
    class Note:
        def after_step(self, run): rates.append([g["lr"] / run.parts.lr(run.step - 1) for g in run.parts.optimizer.param_groups])
    again = fit(r, tmp_path/"cut", "must", quiet=True, callbacks=[Note()])
    assert [round(x, 6) for x in sorted(set(rates[0]))] == [round(0.7**k, 6) for k in (4, 3, 2, 1, 0)]
    assert again.history[-1]["loss"] == whole.history[-1]["loss"]
    files = [(run.path/"model.safetensors").read_bytes() for run in (whole, again)]
    assert files[0] == files[1]

def test_a_frozen_encoder_rests_in_the_network_and_in_its_copy():
    r = recipe("digits_lt", loss="paco", queue=64, freeze="all", n_max=40)
    run = Training(build(r))
    encoders = [run.parts.bare.encoder, run.parts.keys.copy.module.encoder]
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in encoders]
    run.train_step([next(iter(run.parts.loader))])
    judged(run.parts.bare, run.parts)                 # puts the mode back as it was
    run.train_step([next(iter(run.parts.loader))])
    assert run.parts.bare.head.training and not any(net.training for net in encoders)
    for net, was in zip(encoders, before):
        for name, value in net.state_dict().items(): assert value.equal(was[name]), name
