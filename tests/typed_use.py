"A user's program as a type checker reads it; `tests/test_types.py` runs mypy on it, and runs it."
import torch
import torch.nn.functional as F

import acl_nb
from acl_nb import ACLLoss, BadInput, Predictor, Recipe, Run, ViewPipeline, all_gather
from acl_nb import class_balance, class_counts, conflict_rate, fit, load_model, pair_gradients, recipe

def losses(z: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor | None) -> torch.Tensor:
    "Functions return tensors; centres may be left out."
    counts: torch.Tensor = class_counts(4, 50, imbalance=10)
    adjusted = ACLLoss(temperature=0.2, negatives="adjusted", class_counts=counts)
    value: torch.Tensor = acl_nb.acl_loss(z, labels, centers) + acl_nb.scl_loss(z, labels, centers=centers)
    by_views: torch.Tensor = acl_nb.acl_loss(list(z.unbind(1)), labels)
    total: torch.Tensor = value + by_views + adjusted(all_gather(z), all_gather(labels), centers)
    return total

def forces(z: torch.Tensor, labels: torch.Tensor) -> float:
    "What a loss asks of every pair."
    pairs = pair_gradients("acl", z, labels, negatives="batch")
    attraction: torch.Tensor = class_balance(pairs, 4)["attraction"]
    coefficients: torch.Tensor = pairs.coef
    rate: float = conflict_rate(pairs)
    return rate + attraction.sum().item() + coefficients.sum().item()

def train(out: str) -> Run | None:
    "From a recipe to a run."
    r: Recipe = recipe("digits_lt", loss="acl", views=2, epochs=1)
    run = fit(r, out, resume="never", quiet=True, workers=None, track=None)
    epochs: int = r.epochs
    assert epochs == 1
    return run

def use(out: str, images: torch.Tensor) -> torch.nn.Module:
    "A trained model."
    network = load_model(out, revision=None)
    predictor = Predictor(out)
    assert predictor is not None and isinstance(network, torch.nn.Module)
    views: torch.Tensor = ViewPipeline("digits", 8, (0.5,), (0.25,), views=2)(images)
    assert views.ndim == 5
    return network

if __name__ == "__main__":
    z = F.normalize(torch.randn(6, 2, 8), dim=-1)
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    try: losses(2 * z, labels, None)
    except BadInput as e: print(e)
    print(losses(z, labels, F.normalize(torch.randn(4, 8), dim=-1)).shape, forces(z, labels))
