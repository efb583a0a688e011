"Two stages: a run's classifier is trained anew or scaled; such a run goes on, is saved and predicts."
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from acl_nb.answers import open_run
from acl_nb.checks import BadInput
from acl_nb.cli import field_table, resolve
from acl_nb.decoupled import STAGES, second_stage
from acl_nb.models import load_model
from acl_nb.predict import Predictor, export_model
from acl_nb.recipes import recipe
from acl_nb.trainer import fit

TINY = dict(n_max=40, views=1, epochs=3, loss="ce", precision="fp32")

@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "A finished run, whose folder nobody may change."
    return fit(recipe("digits_lt", **TINY), tmp_path_factory.mktemp("first")/"run", quiet=True)

@pytest.fixture(scope="module")
def finished(first, tmp_path_factory):
    "Its second stages, by name."
    root = tmp_path_factory.mktemp("second")
    return {how: fit(second_stage(first.path, how, epochs=3), root/how, quiet=True) for how in STAGES}

def weights(run): return load_file(run.path/"model.safetensors")

TRAINED = {"crt": {"classifier.weight", "classifier.bias"}, "lws": {"classifier.scales"}}

@pytest.mark.parametrize("how", STAGES)
def test_only_what_is_to_be_trained_changes(first, finished, how):
    was, now = weights(first), weights(finished[how])
    predicting = {name for name in now if name.startswith(("encoder.", "classifier."))}
    assert {name for name in was if name.startswith("encoder.")} < predicting
    assert {name for name in predicting if name not in was or not now[name].equal(was[name])} == TRAINED[how]
    if how == "lws": assert not now["classifier.scales"].eq(1).any()

@pytest.mark.parametrize("how", STAGES)
def test_a_step_leaves_all_else_alone(first, how, tmp_path):
    seen = []
    class Look:
        "Keeps the weights at the begin of the run, and those that have a gradient or a momentum."
        def begin(self, run): seen.append({k: v.clone() for k, v in run.parts.bare.state_dict().items()})
        def after_step(self, run):
            moved = {id(p) for p in run.parts.optimizer.state}
            for name, p in run.parts.bare.named_parameters():
                assert (p.grad is not None) == p.requires_grad == (id(p) in moved) == (name in TRAINED[how]), name
    r = second_stage(first.path, how, epochs=1, decay="all", weight_decay=0.1)
    end = weights(fit(r, tmp_path/"run", quiet=True, callbacks=[Look()]))
    begin = seen[0]
    for name in ("weight", "bias"):
        assert begin[f"classifier.{name}"].equal(weights(first)[f"classifier.{name}"]) == (how == "lws")
    unread = ("head.", "centers.")              # the projection's batch statistics; nothing reads it
    moved = {name for name in begin if not end[name].equal(begin[name]) and not name.startswith(unread)}
    assert moved == TRAINED[how]
    parameters = [name for name in begin if name.startswith(unread) and name.endswith(("weight", "bias"))]
    assert parameters and all(end[name].equal(begin[name]) for name in parameters)

class Stop:
    def after_step(self, run):
        if run.step == 4: raise KeyboardInterrupt

@pytest.mark.parametrize("how", STAGES)
def test_it_goes_on_bit_by_bit_even_where_the_first_run_is_gone(first, finished, how, tmp_path):
    copy = tmp_path/"first"
    shutil.copytree(first.path, copy)
    r = second_stage(copy, how, epochs=3)
    whole = fit(r, tmp_path/"whole", quiet=True)
    with pytest.raises(KeyboardInterrupt):
        fit(r, tmp_path/"cut", quiet=True, callbacks=[Stop()], save_every=0)
    shutil.rmtree(copy)
    again = fit(r, tmp_path/"cut", "must", quiet=True)
    files = [(run.path/"model.safetensors").read_bytes() for run in (whole, again)]
    assert files[0] == files[1]
    bare = open_run(again.path)[1].bare.state_dict()
    assert all(value.equal(bare[name]) for name, value in weights(whole).items())
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]
    same = weights(finished[how])                # from the folder of another name
    assert all(value.equal(same[name]) for name, value in weights(whole).items())

@pytest.mark.parametrize("how", STAGES)
def test_a_model_predicts_what_its_run_did(first, finished, how, tmp_path):
    run = finished[how]
    parts = open_run(run.path)[1]
    batch = parts.data.test.images[:50]
    laid_out = dict(memory_format=torch.channels_last)       # as the run's own; else the last digits differ
    alone = load_model(run.path/"model.safetensors").to(**laid_out)
    with torch.no_grad():
        of_run, of_file = (net.eval().predict(parts.plain(batch)[:, 0]) for net in (parts.bare, alone))
    assert of_run.equal(of_file)
    said = Predictor(run.path, "cpu").of_pixels(batch, 1)
    assert said.classes[:, 0].equal(run.predictions["predicted"][:50].to(said.classes))
    exported = torch.export.load(export_model(run.path, tmp_path/"model.pt2"))
    assert torch.allclose(exported.module()(batch), of_file, atol=1e-5)
    with torch.no_grad(): before = load_model(first.path).to(**laid_out).predict(parts.plain(batch)[:, 0])
    if how == "lws": assert of_run.equal(parts.bare.classifier.scales * before)

def test_a_first_stage_of_any_loss_and_the_encoder_as_a_file(tmp_path):
    settings = {**TINY, "loss": "acl", "views": 2, "epochs": 1}
    run = fit(recipe("digits_lt", **settings), tmp_path/"acl", quiet=True)
    by_folder = fit(second_stage(run.path, "lws", epochs=1), tmp_path/"folder", quiet=True)
    file = second_stage(run.path, "lws", epochs=1, encoder_weights=run.path/"model.safetensors")
    by_file = fit(file, tmp_path/"file", quiet=True)
    assert all(value.equal(weights(by_file)[name]) for name, value in weights(by_folder).items())

def refused(make):
    with pytest.raises(BadInput) as error: make()
    return str(error.value)

def test_what_has_no_classifier_to_scale_is_refused(first, tmp_path):
    lws = second_stage(first.path, "lws")
    def start(path, name, **settings):
        r = replace(lws, encoder_weights=str(path), **settings)
        return refused(lambda: fit(r, tmp_path/name, quiet=True))
    other_kind = {**TINY, "epochs": 1, "classifier": "cosine"}
    cosine = fit(recipe("digits_lt", **other_kind), tmp_path/"cosine", quiet=True).path
    needs = "`classifier=lws` needs a run"
    linear = f"{needs} that predicts by a linear classifier, as"
    assert start(cosine, "1") == f"{linear} {cosine} does not; got cosine"
    by_centers = {**TINY, "epochs": 1, "loss": "scl", "views": 2, "readout": "centers"}
    centers = fit(recipe("digits_lt", **by_centers), tmp_path/"centers", quiet=True).path
    assert start(centers, "2") == f"{linear} {centers} does not; got centers"
    alone = tmp_path/"encoder.safetensors"
    save_file({k: v for k, v in weights(first).items() if k.startswith("encoder.")}, alone)
    assert start(alone, "3") == f"{alone} must hold an acl_nb network; its settings are missing"
    other = start(first.path, "4", encoder="resnet8_tiny")
    assert other.startswith(f"`encoder_weights` must be those of the encoder, {first.path} has others; got ")
    order = start(first.path, "5", class_seed=3)
    has_others = f"{needs} with the 10 classes of the data, {first.path} has others, or in another order; got "
    assert order.startswith(has_others)
    (tmp_path/"begun").mkdir()
    missing = "must hold model.safetensors, which a run leaves when it is finished"
    assert start(tmp_path/"begun", "6") == f"{tmp_path/'begun'} {missing}"

SCALES = "`classifier=lws` scales the classifier of a finished run"
ALONE = "`classifier=lws` learns a factor per class and nothing else"
MEANS = "`classifier_init=means` needs a cosine classifier that predicts; got lws, classifier"
LDAM = '`loss="ldam"` works with one kind of it only: `classifier` must be cosine; got lws'
RULES = {
    "no run": (dict(encoder_weights=None), f"{SCALES}: `encoder_weights` must name the run; got none"),
    "encoder": (dict(freeze="early"), f"{ALONE}: `freeze` must be all; got early"),
    "contrast": (dict(loss="acl", views=2), f"{ALONE}: `loss` must be ce, la, cb or gala; got acl"),
    "means": (dict(classifier_init="means"), MEANS),
    "ldam": (dict(loss="ldam"), LDAM),
}

@pytest.mark.parametrize("case", RULES)
def test_what_does_not_go_together_is_refused(first, case):
    settings, sentence = RULES[case]
    assert refused(lambda: replace(second_stage(first.path, "lws"), **settings)) == sentence

def test_the_command_line_of_the_notebook_means_the_same(first):
    fields = [f"encoder_weights={first.path}", "freeze=all", "sampling=class_balanced"]
    fields += ["n_max=40", "precision=fp32"]
    options = dict(loss="ce", views="1", epochs="5")
    for how, more in (("crt", []), ("lws", ["classifier=lws"])):
        r, _ = resolve("digits_lt", None, options, [*fields, *more])
        assert replace(r, name=f"digits_lt_{how}") == second_stage(first.path, how, epochs=5)
    assert "linear | cosine | lws: a run's" in field_table(["classifier"])
    assert "start from this file or run" in field_table(["encoder_weights"])
