"The same bytes for an image's view, whatever the batch, the order, the workers and the processes."
import hashlib
import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from acl_nb.checks import BadInput
from acl_nb.datasets.files import Pictures
from acl_nb.loading import EpochBatches
from acl_nb.recipes import recipe
from acl_nb.trainer import fit
from acl_nb.views import POLICIES, ViewPipeline

N, SEED, EPOCH = 260, 3, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

def picture(i, size=32):
    "Smooth colours and some noise, from whole numbers alone: the same everywhere."
    x, y = torch.arange(size), torch.arange(size)[:, None]
    noise = (x * 7919 + y * 104729 + i * 1299709) % 31
    return torch.stack([(x * (3 + c) + y * (5 - c) + 40 * c + 11 * i + noise) % 256 for c in range(3)]).to(torch.uint8)

class Gallery(Pictures):
    def __init__(self): super().__init__(torch.zeros(N, dtype=torch.long), ["any"], None, "raise")
    def _load(self, i): return picture(i, 48)

def pipeline(policies=("cifar_regular", "cifar_sim", "cifar_sim_blur"), size=32): return ViewPipeline(list(policies), size, MEAN, STD, seed=SEED)

def third_view_of_17(loader, views):
    "From an epoch's batches (images or crops, labels, ids)."
    for images, _, ids in loader:
        if 17 in ids.tolist(): return views(images, ids, EPOCH)[ids.tolist().index(17), 2]

def batches(dataset, batch_size, workers=0): return DataLoader(dataset, batch_sampler=EpochBatches(N, batch_size), num_workers=workers, collate_fn=lambda batch: batch)

def one_rank(r, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=r, world_size=2)
    dataset = Gallery().cut_by(pipeline())
    dataset.epoch.fill_(EPOCH)
    view = third_view_of_17(batches(dataset, 16), pipeline())
    if view is not None: torch.save(view, f"{folder}/view.pt")
    dist.destroy_process_group()

def test_image_17_in_its_third_view(tmp_path):
    dataset = Gallery().cut_by(pipeline())
    dataset.epoch.fill_(EPOCH)
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    views = {f"batches of {b}, {w} workers": third_view_of_17(batches(dataset, b, w), pipeline()) for b, w in ((8, 0), (256, 0), (8, 2), (256, 2))}
    views["two processes"] = torch.load(tmp_path/"view.pt")
    first = views["batches of 8, 0 workers"]
    for name, view in views.items(): assert torch.equal(view, first), name
    assert torch.equal(pipeline()(torch.stack([picture(i) for i in range(12, 20)]), torch.arange(12, 20), EPOCH)[5], pipeline()(picture(17)[None], [17], EPOCH)[0])
    other = third_view_of_17(batches(dataset, 8), ViewPipeline(["plain", "cifar_sim", "cifar_sim_blur"], 32, MEAN, STD, seed=SEED))
    assert torch.equal(other, first)                                  # nor does it depend on the other views
    dataset.epoch.fill_(EPOCH + 1)
    assert not torch.equal(third_view_of_17(batches(dataset, 8), pipeline()), first)

@settings(max_examples=25, deadline=None)
@given(ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=40, unique=True), name=st.sampled_from(sorted(POLICIES)), size=st.sampled_from([5, 12, 32]), data=st.data())
def test_an_image_alone_is_an_image_among_others(ids, name, size, data):
    images = torch.stack([picture(i % 1000, size) for i in ids])
    whole = pipeline([name] * 2, size)(images, torch.tensor(ids), EPOCH)
    some = data.draw(st.lists(st.sampled_from(range(len(ids))), min_size=1, unique=True))
    assert torch.equal(pipeline([name] * 2, size)(images[some], torch.tensor(ids)[some], EPOCH), whole[some])

DIGESTS = {"cifar_regular": "c4acfe618e5dabec",
           "cifar_sim": "e5a0298f155abd65",
           "cifar_sim_blur": "e144da89901946a4",
           "digits": "8ed121db23acd9ed",
           "fashion": "fe1a3ff132907ffa",
           "glyphs": "af7f92d26a0a4e26",
           "imagenet_rand": "45ce54df82d8fe6e",
           "imagenet_sim": "b8cb6c9d907eccaa",
           "imagenet_sim_rand": "ef951f8129f39f9c",
           "plain": "127bf958dd72c8f0"}

@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_the_bytes_are_pinned(name):
    size = 48 if POLICIES[name].crop else 32
    views = pipeline([name] * 2)(torch.stack([picture(i, size) for i in range(64)]), None, EPOCH)
    assert hashlib.sha256(views.numpy().tobytes()).hexdigest()[:16] == DIGESTS[name]

def test_training_from_image_files_does_not_depend_on_the_workers(tmp_path):
    for i in range(36):
        path = tmp_path/"data"/("train" if i < 24 else "test")/"abc"[i % 3]/f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, 40 + i).permute(1, 2, 0).numpy()).save(path)
    tiny = recipe("cifar10_lt", dataset="folder_lt", imbalance="as_is", size=32, data=str(tmp_path/"data"), policy="imagenet_rand+imagenet_sim", encoder="resnet8", dim=8, hidden=8, epochs=2, batch_size=8)
    runs = [fit(tiny, tmp_path/str(workers), quiet=True, workers=workers) for workers in (0, 2)]
    histories = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in open(r.path/"history.jsonl")] for r in runs]
    assert histories[0] == histories[1] and len(histories[0]) == 2

IMAGES = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
WRONG = {"floats": lambda images, draw: images / 255, "a column": lambda images, draw: images[..., :1],
         "bools": lambda images, draw: images > 127, "an array": lambda images, draw: images.numpy(),
         "fewer": lambda images, draw: images[:1]}

@pytest.mark.parametrize("kind", WRONG)
def test_an_own_policy_must_return_what_it_gets(kind):
    pipeline = ViewPipeline(["plain", WRONG[kind]], size=8, mean=(.5,) * 3, std=(.25,) * 3)
    with pytest.raises(BadInput, match="a policy of your own must return images as it gets them, torch.uint8"): pipeline(IMAGES)

def test_an_own_policy_that_works_in_place_changes_no_other_view():
    def blank(images, draw): return images.zero_()
    before = IMAGES.clone()
    views = ViewPipeline([blank, "plain"], size=8, mean=(0.,) * 3, std=(1.,) * 3)(IMAGES)
    assert torch.equal(IMAGES, before) and views[:, 0].eq(0).all()
    assert torch.equal(views[:, 1], IMAGES / 255)

@pytest.mark.parametrize("mean, std", [((123.7, 116.3, 103.5), (.2,) * 3), ((.5,) * 3, (58., 57., 57.)), ((-.5,) * 3, (.5,) * 3)])
def test_statistics_are_of_pixels_in_0_to_1(mean, std):
    with pytest.raises(BadInput, match="must be of pixels in 0..1"): ViewPipeline("plain", size=8, mean=mean, std=std)
