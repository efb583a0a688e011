"The losses in a program of somebody else: its shapes and devices, its transforms and compilers, its process groups."
import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from acl_nb.checks import BadInput
from acl_nb.gradients import embedding_gradient, pair_gradients
from acl_nb.losses import TRAITS, make_loss
from acl_nb.processes import Share, all_gather, mean_of_ranks, own_share
from acl_nb.testing import PretendGPU
from ranks import LIMIT, SERVER

COUNTS = [50, 20, 10, 5]
LABELS = torch.tensor([0, 0, 1, 1, 2, 3])

def unit(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=dtype), dim=-1)

CLASSIFIER = unit(4, 8, seed=7)

class Case:
    "A loss of embeddings, with what it takes beside z and labels."
    def __init__(self, name, **settings):
        self.loss, kind = make_loss(name, class_counts=COUNTS, **settings).double(), TRAITS[name]
        self.joint = kind.kind == "joint"
        self.rest = ()
        if kind.centers != "none": self.rest = unit(4, 8, seed=5),
        if kind.keys == "means": self.rest = 0.9 * unit(4, 8, seed=6),

    def __call__(self, z, labels=LABELS, loss=None):
        loss = loss or self.loss
        if not self.joint: return loss(z, labels, *self.rest)
        views = torch.stack(list(z), 1) if isinstance(z, (list, tuple)) else z
        return loss(z, labels, F.linear(views, CLASSIFIER.to(views)))      # logits of the same embeddings

CASES = {"scl": Case("scl"), "dscl": Case("dscl"), "bcl": Case("bcl"), "acl": Case("acl"),
         "acl adjusted": Case("acl", negatives="adjusted"), "acl not aligned": Case("acl", aligned=False),
         "gpaco": Case("gpaco"), "proco": Case("proco")}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

def value_and_grad(f, z):
    z = z.clone().requires_grad_()
    value = f(z)
    return value.detach(), torch.autograd.grad(value, z)[0]

def close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True): torch.testing.assert_close(a, b, **tolerance)

# --- shapes ---

@every_case
def test_a_list_of_views_is_the_batch(case):
    z = unit(6, 3, 8)
    for kind in (list, tuple):
        close(value_and_grad(lambda z: case(kind(z.unbind(1))), z), value_and_grad(case, z))

@every_case
def test_rows_are_images_with_one_view(case):
    z = unit(6, 8)
    found = value_and_grad(case, z)
    one_view = value_and_grad(case, z[:, None])
    close(found, (one_view[0], one_view[1][:, 0]))

def test_flattened_views_with_their_labels_are_the_same_batch_to_what_knows_no_images():
    z = unit(6, 3, 8)
    for name in ("scl", "bcl", "acl", "acl adjusted", "gpaco", "proco"):
        case, rows = CASES[name], LABELS.repeat_interleave(3)
        close(value_and_grad(lambda z: case(z.flatten(0, 1), rows), z), value_and_grad(case, z))

FORMS = {"scl": {}, "dscl": {}, "bcl": dict(centers=unit(4, 8, seed=5)), "acl": dict(centers=unit(4, 8, seed=5)),
         "paco": dict(logits=unit(18, 4, seed=8), class_counts=COUNTS),
         "proco": dict(means=0.9 * unit(4, 8, seed=6), class_counts=COUNTS)}

@pytest.mark.parametrize("name", FORMS)
def test_closed_forms_take_the_same_shapes(name):
    z, settings = unit(6, 3, 8), FORMS[name]
    expected = pair_gradients(name, z, LABELS, **settings)
    close(pair_gradients(name, list(z.unbind(1)), LABELS, **settings), expected)
    if name == "dscl": return                                       # it asks which views are of one image
    rows = pair_gradients(name, z.flatten(0, 1), LABELS.repeat_interleave(3), **settings)
    close(rows, expected)
    if name == "scl":
        of_rows, of_views = (embedding_gradient(expected, x) for x in (z.flatten(0, 1), list(z.unbind(1))))
        close([of_rows.view(z.shape)], [of_views])

@pytest.mark.parametrize("z, labels, rule", [
    (unit(6, 3, 8), LABELS.repeat_interleave(3), r"`labels` must be \[B\] = \[6\]; got \[18\]"),
    (unit(18, 8), LABELS, r"`labels` must be \[B\] = \[18\]; got \[6\]"),
    (unit(8), LABELS, r"`z` must be \[B, V, D\] or \[N, D\] with B, V, N >= 1; got \[8\]"),
    ([unit(6, 8), unit(5, 8)], LABELS, r"V tensors of one shape \[B, D\]; got \[\[6, 8\], \[5, 8\]\]"),
    ("z", LABELS, r"`z` must be a tensor .* or a list of views \[B, D\]; got str")])
def test_another_shape_is_refused_in_a_sentence(z, labels, rule):
    with pytest.raises(BadInput, match=rule): CASES["acl"](z, labels)

# --- types and devices ---

@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_under_autocast_is_near_to_float32(case, dtype):
    z = unit(6, 3, 8).float()
    expected = value_and_grad(case, z)
    with torch.autocast("cpu", dtype=dtype): found = value_and_grad(lambda z: case(z.to(dtype)), z)
    assert found[0].isfinite() and found[1].isfinite().all()
    close(found, expected, rtol=0.1, atol=0.1, check_dtype=False)

@every_case
def test_labels_of_another_device_are_moved(case):
    moved = copy.deepcopy(case)
    with PretendGPU() as gpu:
        moved.loss.to(gpu.device)
        moved.rest = tuple(t.float().to(gpu.device) for t in case.rest)
        z = unit(6, 3, 8, dtype=torch.float32)
        found = moved(z.to(gpu.device), LABELS).cpu()
    close([found], [case(z)], check_dtype=False)

# --- transforms of torch.func ---

@every_case
def test_grad_vmap_and_their_mixtures_are_those_of_autograd(case):
    batches = torch.stack([unit(6, 3, 8, seed=seed) for seed in range(3)])
    expected = [value_and_grad(case, z) for z in batches]
    values, grads = (torch.stack(parts) for parts in zip(*expected))
    close([torch.func.grad(case)(batches[0])], [grads[0]])
    close([torch.vmap(case)(batches)], [values])
    close([torch.vmap(torch.func.grad(case))(batches)], [grads])
    summed = torch.func.grad(lambda batches: torch.vmap(case)(batches).sum())
    close([summed(batches)], [grads])
    direction = unit(6, 3, 8, seed=9)
    close([torch.func.jvp(case, (batches[0],), (direction,))[1]], [(grads[0] * direction).sum()])

@every_case
def test_second_derivatives_are_those_of_differences(case):
    z, direction = unit(6, 3, 8), unit(6, 3, 8, seed=9)
    step = lambda by: value_and_grad(case, z + by * direction)[1]
    expected = (step(1e-5) - step(-1e-5)) / 2e-5
    twice = torch.func.jvp(torch.func.grad(case), (z,), (direction,))[1]
    leaf = z.clone().requires_grad_()
    first, = torch.autograd.grad(case(leaf), leaf, create_graph=True)
    by_autograd, = torch.autograd.grad((first * direction).sum(), leaf)
    close([twice, by_autograd], [expected, expected], rtol=1e-5, atol=1e-6)

def test_a_wrong_batch_is_still_refused_under_grad():
    with pytest.raises(BadInput, match="unit length"): torch.func.grad(CASES["acl"])(2 * unit(6, 3, 8))

# --- copies, states, compilers ---

@every_case
def test_a_copy_and_a_loaded_state_are_the_same_loss(case):
    z = unit(6, 3, 8)
    for again in (copy.deepcopy(case.loss), copy.copy(case.loss)): close([case(z, loss=again)], [case(z)])
    buffer = io.BytesIO()
    torch.save(case.loss.state_dict(), buffer)
    buffer.seek(0)
    again = copy.deepcopy(case.loss)
    for t in again.buffers(): t.zero_()
    again.load_state_dict(torch.load(buffer, weights_only=True))
    close([case(z, loss=again)], [case(z)])

COUNTED = [name for name in TRAITS if "class_counts" in make_loss(name, class_counts=COUNTS).state_dict()]

@pytest.mark.parametrize("name", COUNTED)
def test_loading_a_state_leaves_the_callers_counts_alone(name):
    counts, more = torch.tensor(COUNTS), dict(negatives="prior") if name == "acl" else {}
    loss = make_loss(name, class_counts=counts, **more)
    state = {key: t + 1 if "class_counts" in key else t for key, t in loss.state_dict().items()}
    loss.load_state_dict(state)
    assert counts.tolist() == COUNTS and loss.class_counts.tolist() == [n + 1 for n in COUNTS]

@every_case
def test_it_compiles_into_one_graph(case):
    torch.compiler.reset()
    z = unit(6, 3, 8)
    compiled = torch.compile(case, backend="aot_eager", fullgraph=True)
    close(value_and_grad(compiled, z), value_and_grad(case, z))

@pytest.mark.parametrize("name", FORMS)
def test_closed_forms_compile_into_one_graph(name):
    torch.compiler.reset()
    form = lambda z: pair_gradients(name, z, LABELS, **FORMS[name]).coef
    close([torch.compile(form, backend="eager", fullgraph=True)(unit(6, 3, 8))], [form(unit(6, 3, 8))])

class Step(nn.Module):
    "A network with its loss, as one exports a step of training."
    def __init__(self, case):
        super().__init__()
        self.network, self.loss = nn.Linear(5, 8).double(), case.loss
        self.case = case

    def forward(self, x, labels): # [B, V, 5], [B] -> scalar
        return self.case(F.normalize(self.network(x), dim=-1), labels, self.loss)

@every_case
def test_a_step_is_exported_and_its_gradient_with_it(case):
    torch.manual_seed(0)
    step, x = Step(case), unit(6, 3, 5)
    exported = torch.export.export(step, (x, LABELS)).module()
    found = exported(x, LABELS), *torch.autograd.grad(exported(x, LABELS), list(exported.parameters()))
    expected = step(x, LABELS), *torch.autograd.grad(step(x, LABELS), list(step.parameters()))
    close(found, expected)

# --- process groups ---

def weights_after(case, x, labels, gather, network, shared):
    "Gradients of the network's weights."
    network.zero_grad()
    z, labels = gather(F.normalize(network(x), dim=-1)), gather(labels)
    share = dict(share=own_share()) if shared else {}
    loss = case.loss(z, labels, *case.rest, **share)
    loss.backward()
    return mean_of_ranks(loss.detach()), *(p.grad.clone() for p in network.parameters())

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 8)).double()

NAMES = ("scl", "dscl", "bcl", "acl", "acl adjusted")

def plain_ddp(number, folder, own_group):
    "One of two processes with a loop of its own; what it finds goes into a file."
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    group = dist.new_group([1, 0]) if own_group else None
    net = nn.parallel.DistributedDataParallel(network(), process_group=group)
    x, found = unit(6, 3, 5)[3 * number:3 * number + 3], {}
    for name in NAMES:
        for shared in (False, True):
            gather = lambda t: all_gather(t, group)
            found[name, shared] = weights_after(CASES[name], x, LABELS[3 * number:3 * number + 3], gather, net, shared)
    torch.save(found, folder/f"{number}.pt")
    dist.destroy_process_group()

@pytest.mark.parametrize("own_group", [False, True])
def test_plain_ddp_in_two_processes_has_the_gradients_of_one(tmp_path, own_group):
    started = [SERVER.Process(target=plain_ddp, args=(r, tmp_path, own_group)) for r in range(2)]
    for p in started: p.start()
    for p in started: p.join(LIMIT)
    assert [p.exitcode for p in started] == [0, 0]
    alone = network()
    for number in range(2):
        for (name, shared), found in torch.load(tmp_path/f"{number}.pt", weights_only=False).items():
            expected = weights_after(CASES[name], unit(6, 3, 5), LABELS, lambda t: t, alone, False)
            close(found, expected, rtol=1e-9, atol=1e-12)

def one_of_three(number, folder):
    "Ranks 0 and 2 share a batch; rank 1 has no part in it."
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=3)
    group = dist.new_group([0, 2])
    t = torch.tensor([float(number)], requires_grad=True)
    if number == 1:
        with pytest.raises(BadInput, match="one that this process belongs to"): all_gather(t, group)
    else:
        gathered = all_gather(t, group)
        (gathered * torch.tensor([1., 10.])).sum().backward()
        found = gathered.tolist(), t.grad.item(), own_share(group)
        assert found == ([0., 2.], 2. if number == 0 else 20., Share(number // 2, 2)), found
    dist.destroy_process_group()

def test_a_group_may_leave_processes_out(tmp_path):
    started = [SERVER.Process(target=one_of_three, args=(r, tmp_path)) for r in range(3)]
    for p in started: p.start()
    for p in started: p.join(LIMIT)
    assert [p.exitcode for p in started] == [0, 0, 0]
