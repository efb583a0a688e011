"The key queue against Python's deque, its place in a checkpoint, and one queue on two processes."
from collections import deque

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from acl_nb.losses import Objective
from acl_nb.momentum import KeyQueue, MomentumCopy
from acl_nb.networks import Output
from acl_nb.pairs import flatten_views
from acl_nb.processes import all_gather

def numbered(first, n):
    "Keys of different directions, labelled in the order of their arrival."
    i = torch.arange(first, first + n)
    return F.normalize(torch.stack([i + 1., torch.ones(n), -i / 7], 1), dim=1), i

def same(queue, other):
    for a, b in zip(queue.state_dict().values(), other.state_dict().values(), strict=True): assert torch.equal(a, b)

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(0, 30), max_size=12), st.integers(0, 12))
def test_contents_are_a_deques_for_any_pushes_and_a_reload(size, pushes, reload_at):
    queue, twin, start = KeyQueue(size, 3), deque(maxlen=size), 0
    for step, n in enumerate(pushes):
        if step == reload_at:
            state, queue = queue.state_dict(), KeyQueue(size, 3)
            queue.load_state_dict(state)
        keys, labels = numbered(start, n)
        queue.push(keys, labels); twin.extend(zip(labels.tolist(), keys)); start += n
        keys, labels = queue.contents()
        order = labels.argsort()
        assert labels[order].tolist() == [i for i, _ in twin]
        if twin: torch.testing.assert_close(keys[order], torch.stack([k for _, k in twin]))

def test_saved_half_full_and_loaded_without_running_code(tmp_path):
    queue, copy = KeyQueue(8, 3), MomentumCopy(nn.BatchNorm1d(3))
    queue.push(*numbered(0, 5)); copy(torch.randn(4, 3))
    torch.save([queue.state_dict(), copy.state_dict()], tmp_path/"state.pt")
    queue_state, copy_state = torch.load(tmp_path/"state.pt", weights_only=True)
    again, copy_again = KeyQueue(8, 3), MomentumCopy(nn.BatchNorm1d(3))
    again.load_state_dict(queue_state); copy_again.load_state_dict(copy_state)
    assert again.contents()[1].tolist() == [0, 1, 2, 3, 4]
    for q in (queue, again): q.push(*numbered(5, 6))
    same(queue, again); same(copy, copy_again)
    assert sorted(again.contents()[1].tolist()) == list(range(3, 11))

class Net(nn.Module):
    "Embeddings and logits of [b, V, 6], float64, no batch statistics: two processes can equal one."
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.head, self.classifier = (nn.Parameter(torch.randn(6, n, generator=g, dtype=torch.float64)) for n in (3, 4))

    def forward(self, x): return Output(F.normalize(x @ self.head, dim=-1), x @ self.classifier, None)

def train(name, mine, average):
    "Four steps on this process's part of 6 images with 3 views; the queue's size is no multiple of anything. -> loss, tensors of all parts"
    net, queue = Net(), KeyQueue(17, 3).double()
    copy, objective, optimizer = MomentumCopy(net, 0.9), Objective(name, [9, 5, 2, 1]), torch.optim.SGD(net.parameters(), 0.1)
    g = torch.Generator().manual_seed(1)
    for step in range(4):
        images, labels = torch.randn(6, 3, 6, generator=g, dtype=torch.float64)[mine], torch.randint(4, (6,), generator=g)[mine]
        out, y = net(images[:, :1] if name == "paco" else images), all_gather(labels)
        whole = Output(all_gather(out.z), all_gather(out.logits), None)
        new, new_labels = flatten_views(all_gather(copy(images[:, 1:]).z) if name == "paco" else whole.z.detach(), y)
        keys, key_labels = queue.contents()
        if name == "paco": keys, key_labels = torch.cat([new, keys]), torch.cat([new_labels, key_labels])
        loss, _ = objective(whole, y, keys, key_labels)
        optimizer.zero_grad(); loss.backward(); average(net); optimizer.step()
        copy.update(net); queue.push(new, new_labels)
    return [loss.detach(), *net.state_dict().values(), *copy.state_dict().values(), *queue.state_dict().values()]

def average_gradients(net):
    for p in net.parameters(): dist.all_reduce(p.grad); p.grad /= 2        # what DistributedDataParallel does

def one_rank(r, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=r, world_size=2)
    torch.save({name: train(name, slice(3*r, 3*r + 3), average_gradients) for name in ("paco", "gpaco")}, f"{folder}/{r}.pt")
    dist.destroy_process_group()

def test_two_processes_have_the_queue_and_the_copy_of_one(tmp_path):
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path/f"{r}.pt", weights_only=True) for r in (0, 1)]
    for name in ("paco", "gpaco"):
        one = train(name, slice(None), lambda net: None)
        assert one[-1] == (48 if name == "paco" else 72)                      # 4 steps x 6 images x 2 or 3 keys
        for a, b, c in zip(*(r[name] for r in ranks), one):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
