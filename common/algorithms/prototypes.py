"""Prototypical networks over noisy prototypes: the support set enters through one private class sum, after which the
query's loss splits over patients again and every further step is an ordinary gradient query (sensitivity C, not 2C).

    m_c = noisy sum of features of class c / noisy count;   head = nearest mean;   K steps on the body under that head

The sums of earlier rounds are releases too: the site adds them up, and noise that is drawn anew each round averages out
while the body moves slowly. What noise is left is shrunk by the positive-part rule of James and Stein (Baranchik 1964).
"""

from __future__ import annotations

from torch import Tensor, tensor

from common.algorithms.class_means import adapt_by_class_means, head_of
from common.algorithms.descent import step
from common.algorithms.interface import Algorithm, ClassSums, LocalUpdate, PrivateQueries
from common.models import HEAD
from common.params import Params, subtract, zeros_like
from common.plan import AlgorithmSpec

_FEWEST = 0.02  # a class whose noisy share of the patients is below this has no prototype of use
_FEATURES, _COUNTS, _STD = "sums.features", "sums.counts", "sums.std"


def remembered(kept: Params, sums: ClassSums) -> ClassSums:
    """This round's sums added to those that the site has kept."""
    if _FEATURES not in kept:
        return sums
    std = (float(kept[_STD]) ** 2 + sums.std**2) ** 0.5
    return ClassSums(kept[_FEATURES] + sums.features, kept[_COUNTS] + sums.counts, std)


def memory_of(sums: ClassSums) -> Params:
    """The sums as the site keeps them."""
    return {_FEATURES: sums.features, _COUNTS: sums.counts, _STD: tensor([sums.std])}


def prototypes_of(sums: ClassSums) -> tuple[Tensor, Tensor]:
    """Class means (ways, F), shrunk towards 0 by what is noise in them, and counts, 0 where noise ate a class."""
    total = sums.counts.clamp(min=0).sum().clamp(min=1e-12)
    counts = sums.counts * (sums.counts > _FEWEST * total)
    squares = sums.features.square().sum(dim=1, keepdim=True).clamp(min=1e-12)
    kept = (1 - sums.features.shape[1] * sums.std**2 / squares).clamp(min=0)
    return kept * sums.features / counts.clamp(min=_FEWEST * float(total)).unsqueeze(1), counts


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """One class sum at theta, then `inner_steps` gradient steps under the head that it gives."""
    sums = remembered(kept, private.class_sums(shared))
    head = head_of(*prototypes_of(sums))
    body = {name: value for name, value in shared.items() if not name.startswith(HEAD)}
    phi = body
    for _ in range(spec.inner_steps):
        phi = step(phi, private.gradient(phi, fixed=head), spec)
    update = zeros_like(shared) | subtract(phi, body)  # a shared head is not learned: it is read off
    return LocalUpdate(update=update, kept=head | memory_of(sums))


ALGORITHM = Algorithm(
    title="Noisy prototypes",
    local_update=local_update,
    queries_per_round=lambda spec: spec.inner_steps + 1,
    adapt=adapt_by_class_means,
    keeps=True,
)
