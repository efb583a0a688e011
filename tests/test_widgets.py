"The explorers without a browser: every position of every control, numbers against `class_balance`, no figure or memory left behind."
import gc
import json
import math
import weakref
from dataclasses import asdict

import ipywidgets
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from acl_nb.gradients import class_balance, conflict_rate, pair_gradients
from acl_nb.networks import Network, save_network
from acl_nb.recipes import recipe
from acl_nb.records import write_json
from acl_nb.widgets import (balance_explorer, conflict_explorer, count_explorer, made_batch, run_explorer, views_explorer)

SLOW_OK = dict(deadline=None, suppress_health_check=list(HealthCheck))

def position(control):
    "Any value that a reader can give a control."
    if isinstance(control, ipywidgets.IntSlider): return st.integers(0, (control.max - control.min) // control.step).map(lambda k: control.min + k * control.step)
    if isinstance(control, ipywidgets.Checkbox): return st.booleans()
    return st.sampled_from([v for _, v in control._options_full])

def positions(make, **limits):
    "A strategy for the values of all controls of an explorer."
    explorer = make()
    space = {name: position(c) for name, c in explorer.controls.items()}
    explorer.close()
    return st.fixed_dictionaries(space | limits)

def moved(explorer, values):
    "Move every control, one after the other; each move redraws."
    traces, children = len(explorer.figure.data), len(explorer.children)
    for name, value in values.items(): explorer.controls[name].value = value
    assert explorer.values == values and len(explorer.figure.data) == traces and len(explorer.children) == children
    json.dumps(explorer.figure.to_dict(), default=list, allow_nan=False)
    return explorer.figure

def direct(batch, loss, aligned, centers, negatives, temperature):
    "The pairs of a loss, without anything that an explorer keeps."
    z, y, kw = batch.z, batch.labels, {"temperature": temperature}
    if loss == "SCL": return pair_gradients("scl", z, y, **kw)
    if loss == "BCL": return pair_gradients("bcl", z, y, batch.centers, **kw)
    if loss == "PaCo": return pair_gradients("paco", z, y, logits=z @ batch.centers.T / temperature, class_counts=batch.counts, **kw)
    return pair_gradients("acl", z, y, batch.centers if centers else None, aligned=aligned, negatives=negatives, class_counts=batch.counts, **kw)

def open_all_along(make):
    @pytest.fixture(scope="module")
    def explorer():
        made = make()
        yield made
        made.close()
    return explorer

balance, conflict, count, views = map(open_all_along, (balance_explorer, conflict_explorer, count_explorer, views_explorer))

SMALL = {"batch_size": st.sampled_from([1, 2, 4, 8, 16, 32, 64])}      # the largest batches differ in time alone

@settings(max_examples=60, **SLOW_OK)
@given(values=positions(balance_explorer, **SMALL))
def test_the_balance_explorer_shows_class_balance_at_every_position(balance, values):
    v, C = values, values["classes"]
    figure = moved(balance, v)
    batch = made_batch(v["views"], v["batch_size"], C, v["imbalance"], v["geometry"], v["seed"])
    for side, first in (("left", 0), ("right", 4)):
        pairs = direct(batch, *(v[f"{side}_{key}"] for key in ("loss", "aligned", "centers", "negatives")), v["temperature"])
        b, names = class_balance(pairs, C), [f"class {j}, {batch.counts[j]} images" for j in range(C)]
        for trace, key, sign in zip(figure.data[first:first + 3], ("attraction", "wrong_way", "repulsion"), (1, -1, -1)):
            order = [names.index(text) for text in trace.customdata]
            assert sorted(order) == list(range(C))
            if v["bars"] == "sum": torch.testing.assert_close(torch.tensor([float(y) for y in trace.y]), sign * b[key][order].float(), rtol=1e-3, atol=2e-6)
        rate = conflict_rate(pairs)
        assert ("–" if math.isnan(rate) else f"{rate:.0%}") in figure.layout.annotations[first // 4].text or v["geometry"] == "collapsed"    # there every share is 1/|P| to rounding

@settings(max_examples=40, **SLOW_OK)
@given(values=positions(conflict_explorer))
def test_the_conflict_explorer_at_every_position(conflict, values):
    figure = moved(conflict, values)
    keys = values["views"] - 1 + values["images"] + values["negatives"]
    assert len(figure.data[16].y) == len(figure.data[17].y) == len(figure.data[16].marker.color) == keys
    assert sum(len(figure.data[k].x) for k in (2, 4, 6)) == sum(len(figure.data[k].x) for k in (10, 12, 14)) == keys
    assert len(figure.data[14].x) == 0                                  # ACL pushes no positive, wherever the points are

@settings(max_examples=40, **SLOW_OK)
@given(values=positions(count_explorer))
def test_the_count_explorer_at_every_position(count, values):
    figure = moved(count, values)
    assert len(figure.data[0].y) == values["classes"] and min(figure.data[0].y) >= 1
    assert sum(figure.data[1].y) == pytest.approx(values["views"] * values["batch_size"])

@settings(max_examples=10, **SLOW_OK)
@given(values=positions(views_explorer))
def test_the_views_explorer_at_every_position(views, values):
    figure = moved(views, values)
    assert figure.data[0].source.startswith("data:image/png") and len(figure.layout.yaxis.ticktext) >= 1

def run_folder(path, epochs=3):
    torch.manual_seed(0)
    path.mkdir()
    write_json(path/"recipe.json", asdict(recipe("digits_lt", encoder="resnet8", dim=8, hidden=8)))
    save_network(Network(10, 1, "resnet8", 8, 8), path/"model.safetensors")
    write_json(path/"env.json", {"data": {"name": "digits", "counts": list(range(100, 0, -10))}})
    rows = [{"epoch": e, "loss": 1., "top1": .5, "balance": {"attraction": [e / 10] * 10, "wrong_way": [0.] * 10, "repulsion": [.1] * 10, "conflict_rate": .2, "steps": 1}} for e in range(1, epochs + 1)]
    (path/"history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_json(path/"summary.json", {"top1": .5, "epochs": epochs, "per_class": [.5] * 9 + [None]})
    return path

def test_a_run_beside_another_at_every_epoch(tmp_path):
    explorer = run_explorer([run_folder(tmp_path/"a"), run_folder(tmp_path/"b", 5)])
    for epoch in range(1, 6):
        figure = moved(explorer, {"epoch": epoch})
        assert figure.data[4].y[0] == pytest.approx(min(epoch, 3) / 10) and figure.data[7].y[0] == pytest.approx(epoch / 10)
    explorer.close()

def test_a_runs_own_embeddings(tmp_path):
    explorer = balance_explorer(run_folder(tmp_path/"mine"))
    moved(explorer, explorer.values | {"batch_size": 16, "geometry": "run mine"})
    assert len(explorer.figure.data[0].y) == 10 and explorer.controls["classes"].disabled
    moved(explorer, explorer.values | {"temperature": .5, "left_loss": "ACL", "views": 1})
    explorer.close()

def held(make):
    "What is alive of an explorer once it was moved, closed and forgotten."
    explorer = make()
    for c in explorer.controls.values():
        if isinstance(c, ipywidgets.IntSlider): c.value = c.max if c.max < 10 else c.min
    seen = [weakref.ref(w) for w in (explorer, explorer.figure, *explorer.controls.values())]
    explorer.close()
    del explorer, c
    gc.collect()
    return [s() for s in seen if s() is not None]

@pytest.mark.parametrize("make", [balance_explorer, conflict_explorer, count_explorer, views_explorer], ids=lambda f: f.__name__)
def test_a_closed_explorer_leaves_nothing(make):
    assert held(make) == []
    before = len(ipywidgets.widgets.widget._instances)
    assert held(make) == [] and len(ipywidgets.widgets.widget._instances) == before

def test_moving_piles_up_no_widgets_and_no_batches():
    explorer = balance_explorer()
    explorer.controls["batch_size"].value = 4
    before = len(ipywidgets.widgets.widget._instances)
    for k in range(20): explorer.controls["seed"].value = k
    assert len(ipywidgets.widgets.widget._instances) == before
    assert explorer.read.batch.cache_info().currsize <= 2 and explorer.read.numbers.cache_info().currsize <= 4
    explorer.close()

def test_every_control_is_labelled_in_words(tmp_path):
    for make in (balance_explorer, conflict_explorer, count_explorer, views_explorer, lambda: run_explorer(run_folder(tmp_path/"r"))):
        explorer = make()
        assert all(c.description and "_" not in c.description for c in explorer.controls.values())
        explorer.close()
