"""What `fashion_factors.json` needs beside the package: stronger views, and ACL with a weight that fades."""
from functools import partial

from acl_nb.losses import TRAITS, ACLLoss, register_loss
from acl_nb.plugins import CALLBACKS
from acl_nb.views import POLICIES
from acl_nb.views.crops import random_erase, random_flip
from acl_nb.views.policies import Policy

# SimCLR's crop in place of a shift by two pixels, and a hole of four times the area.
POLICIES["fashion_strong"] = Policy(
    {"flip": random_flip, "erase": partial(random_erase, size=16, p=0.5)}, crop=(0.2, 1.0))


class FadingACLLoss(ACLLoss):
    "ACL; what fades is its weight in the objective, by the callback below."


def faded(epoch, epochs):
    "Factor of λ in an epoch (0, 1, …): a parabola that ends at 0 and is 1 in the mean over the run."
    return 1.5 * (1 - ((epoch + 0.5) / epochs) ** 2)


class Fading:
    "Sets λ before each epoch; in runs of other losses it does nothing."
    def __init__(self, recipe):
        self.weight = recipe.weight if recipe.loss == "acl_fading" else None

    def begin(self, run):
        if self.weight is not None:
            run.parts.objective.weight = self.weight * faded(run.epoch, run.parts.recipe.epochs)

    after_epoch = begin


acl = TRAITS["acl"]
register_loss("acl_fading", FadingACLLoss, form=acl.form, options=acl.options, usual=acl.usual)
CALLBACKS["fading"] = Fading
