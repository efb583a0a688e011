"""SCL with a part of its gradient taken out: losses for an experiment, which `fashion_conflict.json` names as its plugin."""
import torch
from torch import nn

from acl_nb.gradients.scl import scl_pair_gradients
from acl_nb.losses import register_loss
from acl_nb.pairs import contrast


def cut(pairs, balanced=False):
    """Coefficients [N, K] of SCL in which no positive is pushed away.

    `balanced`: the anchor's pull on its positives is weakened too, by one factor, until it
    equals the push that is left, as it does in SCL.
    """
    coef = torch.where(pairs.positive, pairs.coef.clamp(max=0), pairs.coef)
    if not balanced:
        return coef
    pull = torch.where(pairs.positive, -coef, 0).sum(1, keepdim=True)
    push = torch.where(pairs.negative, coef, 0).sum(1, keepdim=True)
    factor = push / pull.clamp_min(torch.finfo(pull.dtype).tiny)
    return torch.where(pairs.positive, factor * coef, coef)


def value_of(pairs):
    "SCL of pairs, formed at its temperature."
    every, n_pos = pairs.positive | pairs.negative, pairs.positive.sum(1)
    lse = pairs.sim.masked_fill(~every, -torch.inf).logsumexp(1)
    pull = torch.where(pairs.positive, pairs.sim, 0).sum(1) / n_pos.clamp_min(1)
    return torch.where(n_pos > 0, lse - pull, 0).sum() / (n_pos > 0).sum().clamp_min(1)


def cut_scl_of(pairs, balanced=False):
    "SCL's value, with the cut coefficients as its gradient in the similarities."
    sim = pairs.sim.detach()
    fixed = pairs._replace(sim=sim)
    coef = cut(scl_pair_gradients(fixed), balanced)
    return value_of(fixed) + (coef * (pairs.sim - sim)).sum()


class CutSCLLoss(nn.Module):
    "SCL that never pushes a positive away."
    balanced = False

    def __init__(self, temperature=0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, z, labels, centers=None):  # [B, V, D], [B], [C, D] -> scalar
        return cut_scl_of(contrast(z, labels, self.temperature, centers), self.balanced)


class BalancedCutSCLLoss(CutSCLLoss):
    "The same, with the pull weakened by as much as the push was."
    balanced = True


def balanced_of(pairs):
    "The same, balanced."
    return cut_scl_of(pairs, balanced=True)


for name, module, form in [("scl_cut", CutSCLLoss, cut_scl_of),
                           ("scl_cut_balanced", BalancedCutSCLLoss, balanced_of)]:
    register_loss(name, module, form=form, usual=dict(centers="none"))
