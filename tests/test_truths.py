"Small truths that once were not: each test was red before its fault was mended."
import pytest
import torch

from acl_nb.views import Draws
from acl_nb.views.crops import crop_batch, crop_boxes, random_blur

# --- TF32

COARSE = {
    "current, of CUDA": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "current, of oneDNN": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "current, of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "legacy, of CUDA": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "legacy, high": lambda: torch.set_float32_matmul_precision("high"),
    "legacy, medium": lambda: torch.set_float32_matmul_precision("medium"),
}

def precisions():
    "Everything that can be read of how float32 is multiplied; what torch refuses to say is None."
    found = [b.fp32_precision for b in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]
    for legacy in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            found.append(legacy())
        except RuntimeError:
            found.append(None)
    return found

@pytest.fixture
def usual_precision():
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"

def cropped_and_blurred():
    ids = torch.arange(20)
    images = torch.randint(0, 256, (20, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crops = crop_batch(images, crop_boxes(Draws(ids), 40, 40), 32)
    return random_blur(crops, Draws(ids, seed=1), p=1.0)

@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("switch_on", COARSE.values(), ids=COARSE)
def test_tf32_changes_no_view_and_stays_as_the_user_set_it(usual_precision, monkeypatch, switch_on):
    exact = cropped_and_blurred()
    switch_on()
    before, within = precisions(), []
    product = torch.baddbmm

    def watched(*args):
        within.append(precisions()[1:3])
        return product(*args)

    monkeypatch.setattr(torch, "baddbmm", watched)
    assert torch.equal(cropped_and_blurred(), exact)
    assert precisions() == before
    assert len(within) > 0 and all(set(found) <= {"ieee", "none"} for found in within)

def test_a_precision_that_was_inherited_is_inherited_still(usual_precision):
    torch.backends.fp32_precision = "tf32"
    cropped_and_blurred()
    torch.backends.fp32_precision = "none"
    assert precisions()[:3] == ["none"] * 3
