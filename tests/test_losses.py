"What holds for every contrastive loss on any batch: order, rotation and order of views do not matter; fast equals plain; nothing is ever nan."
from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from acl_nb.checks import BadInput
from acl_nb.gradients import check_loss, conflict_rate, embedding_gradient, pair_gradients
from acl_nb.losses import LOSSES, TRAITS, LossTraits, losses_that
from acl_nb.losses import acl_loss, bcl_loss, dscl_loss, gpaco_loss, make_loss, scl_loss
from acl_nb.losses.acl import acl_loss_plain
from acl_nb.losses.bcl import bcl_loss_plain
from acl_nb.losses.scl import scl_loss_plain
from acl_nb.pairs import NEGATIVES, contrast
from acl_nb.probes import Probe
from acl_nb.recipes import recipe
from acl_nb.trainer import fit

COUNTS = [500, 120, 30, 8, 2]
PLAIN = {scl_loss: scl_loss_plain, bcl_loss: bcl_loss_plain, acl_loss: acl_loss_plain}

@st.composite
def batches(draw):
    "z [B, V, D], labels, centers [5, D], temperature, some views of an image nearly equal."
    B, V, D = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(2, 8))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    image = torch.randn(B, 1, D, generator=g, dtype=torch.float64)
    z = F.normalize(image + draw(st.sampled_from([0., 1e-3, 0.3, 3.])) * torch.randn(B, V, D, generator=g, dtype=torch.float64), dim=-1)
    labels = torch.randint(draw(st.integers(1, 5)), (B,), generator=g)
    return z, labels, F.normalize(torch.randn(5, D, generator=g, dtype=torch.float64), dim=-1), draw(st.sampled_from([0.02, 0.1, 1.0]))

@st.composite
def losses(draw):
    "(loss, arguments), centres included where asked for."
    name, with_centers = draw(st.sampled_from(["scl", "bcl", "acl"])), draw(st.booleans())
    if name == "scl": return scl_loss, {}, with_centers
    if name == "bcl": return bcl_loss, {}, True
    return acl_loss, dict(aligned=draw(st.booleans()), negatives=draw(st.sampled_from(NEGATIVES)), class_counts=COUNTS), with_centers

OF_EMBEDDINGS = [name for name, cls in LOSSES.items() if list(signature(cls.forward).parameters)[1:4] == ["z", "labels", "centers"]]     # a new one is in it by itself

@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_what_holds_for_any_loss(name): check_loss(make_loss(name, class_counts=COUNTS), len(COUNTS), without=name != "bcl")

def value(loss, z, labels, centers, temperature): return loss[0](z, labels, centers=centers if loss[2] else None, temperature=temperature, **loss[1])

def close(a, b): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

@settings(max_examples=60, deadline=None)
@given(batches(), losses(), st.integers(0, 2**31))
def test_order_rotation_and_views_do_not_matter(batch, loss, seed):
    z, labels, centers, temperature = batch
    g = torch.Generator().manual_seed(seed)
    before = value(loss, z, labels, centers, temperature)
    images, views = torch.randperm(len(z), generator=g), torch.randperm(z.shape[1], generator=g)
    rotation, _ = torch.linalg.qr(torch.randn(z.shape[-1], z.shape[-1], generator=g, dtype=torch.float64))
    close(value(loss, z[images], labels[images], centers, temperature), before)
    close(value(loss, z[:, views], labels, centers, temperature), before)
    close(value(loss, z @ rotation, labels, centers @ rotation, temperature), before)

@settings(max_examples=60, deadline=None)
@given(batches(), losses(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_fast_equals_plain_and_all_is_finite(batch, loss, dtype):
    z, labels, centers, temperature = batch
    results = []
    for f in (loss[0], PLAIN[loss[0]]):
        leaf = z.to(dtype).requires_grad_()
        out = value((f, *loss[1:]), leaf, labels, centers.to(dtype), temperature)
        out.backward()
        assert out.isfinite() and leaf.grad.isfinite().all()
        results.append((out.detach(), leaf.grad))
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.02}[dtype]
    of_rounding = torch.finfo(torch.float32).eps / temperature**2 if dtype == torch.float32 else 0     # of two similarities over τ
    for fast, plain in zip(*results):
        atol = tolerance * (1 + plain.abs().max().item()) + of_rounding
        torch.testing.assert_close(fast, plain, rtol=tolerance, atol=atol)

@settings(max_examples=60, deadline=None)
@given(batches(), losses())
def test_closed_form_equals_autograd(batch, loss):
    z, labels, centers, temperature = batch
    leaf = z.clone().requires_grad_()
    by_autograd, = torch.autograd.grad(value(loss, leaf, labels, centers, temperature), leaf)
    cs = centers if loss[2] else None
    name = loss[0].__name__.removesuffix("_loss")
    pairs = pair_gradients(name, z, labels, cs, temperature=temperature, **loss[1])
    scale = max(1., by_autograd.abs().max().item())
    torch.testing.assert_close(embedding_gradient(pairs, z, cs, temperature), by_autograd, rtol=0, atol=1e-10 * scale)
    if name == "acl" and loss[1]["aligned"] and pairs.positive.any(): assert conflict_rate(pairs) == 0

@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from([0., 0.1, 1.]), st.booleans())
def test_dscl_closed_form_equals_autograd(batch, alpha, with_centers):
    z, labels, centers, temperature = batch
    cs, leaf = centers if with_centers else None, z.clone().requires_grad_()
    by_autograd, = torch.autograd.grad(dscl_loss(leaf, labels, alpha, temperature, cs), leaf)
    pairs = pair_gradients("dscl", z, labels, cs, temperature=temperature, alpha=alpha)
    scale = max(1., by_autograd.abs().max().item())
    found = embedding_gradient(pairs, z, cs, temperature)
    torch.testing.assert_close(found, by_autograd, rtol=0, atol=1e-10 * scale)

@settings(max_examples=30, deadline=None)
@given(batches())
def test_gpaco_closed_form_equals_autograd(batch):
    z, labels, _, temperature = batch
    g = torch.Generator().manual_seed(0)
    logits, leaf = torch.randn(*z.shape[:2], 5, generator=g, dtype=torch.float64), z.clone().requires_grad_()
    by_autograd, = torch.autograd.grad(gpaco_loss(leaf, labels, logits, COUNTS, alpha=0.05, temperature=temperature), leaf)
    pairs = pair_gradients("paco", z, labels, logits=logits, class_counts=COUNTS, alpha=0.05, temperature=temperature)
    torch.testing.assert_close(embedding_gradient(pairs, z, temperature=temperature), by_autograd, rtol=0, atol=1e-9)

Z, Y, C = F.normalize(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), dim=-1), torch.tensor([0, 1, 0]), torch.eye(4)[:2]

@pytest.mark.parametrize("f", [scl_loss, bcl_loss, acl_loss])
@pytest.mark.parametrize("z, labels, centers, temperature, said", [
    (Z[0, 0], Y, C, .1, "`z` must be [B, V, D]"), (2*Z, Y, C, .1, "unit length (within 0.02)"), (Z * float("nan"), Y, C, .1, "must be finite"),
    (Z, Y + 1, C, .1, "below the 2 classes"), (Z, Y - 1, C, .1, "at least 0; got -1"), (Z, Y.float(), C, .1, "whole numbers; got torch.float32"),
    (Z, Y[:2], C, .1, "`labels` must be [B] = [3]; got [2]"), (Z, Y, C[:, :3], .1, "`centers` must be [C, 4]"), (Z, Y, C, 0., "`temperature` must be positive; got 0.0")])
def test_bad_input_is_one_sentence(f, z, labels, centers, temperature, said):
    with pytest.raises(BadInput) as e: f(z, labels, centers=centers, temperature=temperature)
    assert said in str(e.value) and "\n" not in str(e.value)

def functions_of(value):
    "Names of all functions in the graph of a value."
    found, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        found.add(node.name())
        todo += [before for before, _ in node.next_functions if before is not None]
    return found

@pytest.mark.parametrize("name", LOSSES)
def test_which_losses_are_swept_in_tiles(name):
    traits, loss = TRAITS[name], make_loss(name, class_counts=COUNTS[:2])
    z = Z.clone().requires_grad_()
    logits = z @ C.T
    if traits.kind == "contrastive":
        result = loss(z, Y, C)
    elif name == "paco":
        result = loss(z[:, 0], z[:, 0], Y, Y, logits[:, 0])
    elif name == "gpaco":
        result = loss(z, Y, logits)
    else:
        result = loss(logits[:, 0], Y)
    assert ("_TiledLossBackward" in functions_of(result)) == (name in ("scl", "dscl", "bcl", "acl"))

class Between(torch.nn.Module):
    "A throw-away loss: the positives' share of the denominator counts half."
    def __init__(self, temperature=0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, z, labels, centers=None):
        return between(contrast(z, labels, self.temperature, centers))

def between(c):
    "Of a batch's pairs: supervised contrastive, with positives at half their weight among the keys."
    weight = torch.where(c.positive, 0.5, 1.0).masked_fill(~(c.positive | c.negative), 0)
    top = c.sim.detach().max()
    denominator = top + ((c.sim - top).exp() * weight).sum(1, keepdim=True).log()
    count = c.positive.sum(1)
    per_anchor = ((denominator - c.sim) * c.positive).sum(1)[count > 0] / count[count > 0]
    return per_anchor.mean()

def test_a_new_loss_is_one_entry_of_the_table(monkeypatch, tmp_path):
    traits = LossTraits(Between, centers="optional", form=between, usual=dict(centers="weights"))
    monkeypatch.setitem(TRAITS, "between", traits)
    monkeypatch.setitem(LOSSES, "between", traits.module)              # in the notebook it is made from the table
    small = dict(n_max=20, imbalance=4, dim=8, hidden=8, views=2, epochs=1)
    r = recipe("digits_lt", loss="between", readout="centers", **small)
    assert r.centers == "weights" and losses_that(lambda t: t.module is Between) == ["between"]
    with pytest.raises(BadInput, match="`negatives` must not be set: between does not read it"):
        recipe("digits_lt", loss="between", negatives="prior", **small)
    run = fit(r, tmp_path/"run", quiet=True, callbacks=[Probe(r, 1)])
    row, = run.history
    assert run.summary["loss"] == "between" and 0 < row["contrastive"] < float("inf")
    assert {"attraction", "wrong_way", "repulsion", "conflict_rate"} <= set(row["balance"])
    with pytest.raises(BadInput, match="did you mean between"): recipe("digits_lt", loss="betwen")
