"""Membership inference: who of 2N candidates is among the N patients whose updates the lab received.

The lab has every candidate's images, so it computes what each would add. In units of one step's noise, the update of
round r is, with m_j and b_jk the coins of membership and of joining (probability q),

    u_r = sum_j m_j sum_k b_jk s_jkr + Normal(0, v I),    s_jkr = clipped gradient of candidate j in step k / (z C)

and with it a linear Gaussian model of all rounds together: m_j of mean and deviation 1/2, b_jk independent. With L_r
half of q sum_k s_jkr (centred, for half of the candidates are in), D_r the covariance of noise and joining, and

    M = sum_r L_r' D_r^-1 L_r,    H = (I + M)^-1,    y_r = u_r - E u_r

the log-likelihood ratio of candidate j in against out, everybody else unknown, is 2 (H sum_r L_r' D_r^-1 y_r)_j / H_jj.
That is a likelihood-ratio attack (Carlini 2022, arXiv:2112.03570) whose distributions follow from the known noise and
not from shadow models. v is K for K steps where the noise is known; what the model leaves unexplained (a head that
stays at the hospital, curvature) only adds to it, and is estimated by maximum likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from client.data.dataset import SiteData
from common.accounting import plan_cost
from common.algorithms import ALGORITHMS
from common.algorithms.descent import inner_loop
from common.algorithms.interface import ClassSums
from common.episodes import MetaLoss
from common.inner_loop import rate
from common.learner import Learner
from common.models import HEAD, build_model, head_names, parameters
from common.params import Params, select, zeros_like
from common.plan import StudyPlan
from common.tasks import task_of

_CHUNK = 100  # images in one vmap
_SPAN = 1e-10  # eigenvalues below this share of the largest span nothing
_LEAST, _GUESSES = 1e-9, 16  # of the noise, as a share of the update's mean square, where it is not known
_REDRAWN = 1000


@dataclass(frozen=True)
class Evidence:
    """One round in coordinates in which noise and joining are independent; float64, d' <= d numbers."""

    surprise: Tensor  # (d',): y_r
    joining: Tensor  # (d',): variances by the coins b_jk
    shifts: Tensor  # (P, d'): L_r
    rest: float  # squared length of what no candidate can explain, in `spare` more dimensions
    spare: int


def evidence_of(update: Tensor, steps: Tensor, *, sample_rate: float, mean: bool) -> Evidence:
    """`update` (d,) and what each candidate would add in each step (K, P, d), in units of one step's noise.

    `mean` says that there was no privacy. Then the hospital divided by how many joined, so joining moves the update by
    what is not the mean; and there is no unit of noise, so that each round is brought to the same size.
    """
    count, candidates, size = steps.shape
    steps = steps.double()
    if mean:
        steps, update = (value / update.double().square().mean().sqrt() for value in (steps, update))
    surprise = update.double() - 0.5 * sample_rate * steps.sum(dim=(0, 1))
    rest, spare = 0.0, 0
    if count * candidates < size:
        steps, surprise, rest, spare = _within_span(steps, surprise)
    whole = steps.sum(dim=0)
    shifts = 0.5 * sample_rate * (whole - whole.mean(dim=0))
    joined = (steps - steps.mean(dim=1, keepdim=True) if mean else steps).flatten(0, 1)
    if sample_rate == 1:
        return Evidence(surprise, torch.zeros_like(surprise), shifts, rest, spare)
    variances, axes = torch.linalg.eigh(0.5 * sample_rate * (1 - sample_rate) * joined.T @ joined)
    return Evidence(surprise @ axes, variances.clamp(min=0.0), shifts @ axes, rest, spare)


def _within_span(steps: Tensor, surprise: Tensor) -> tuple[Tensor, Tensor, float, int]:
    """The same in an orthonormal basis of what candidates can add; squared length and dimensions of the rest."""
    rows = steps.flatten(0, 1)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > _SPAN * values[-1]
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    inside = (vectors.T @ (rows @ surprise)) / roots
    rest = max(0.0, float(surprise.square().sum() - inside.square().sum()))
    reduced = (vectors * roots).reshape(*steps.shape[:2], len(roots))
    return reduced, inside, rest, len(surprise) - len(roots)


def log_likelihood_ratios(rounds: Sequence[Evidence], *, noise: float) -> Tensor:
    """In against out, for each candidate; float64 (P,). `noise` is the known variance, 0 without privacy."""
    energy = sum(float(one.surprise.square().sum()) + one.rest for one in rounds)
    mean_square = energy / sum(len(one.surprise) + one.spare for one in rounds)
    least, most = max(noise, _LEAST * mean_square), max(noise, mean_square)
    guesses = [least * (most / least) ** (n / (_GUESSES - 1)) for n in range(_GUESSES)]
    return max((_posterior(rounds, guess) for guess in guesses), key=lambda found: found[0])[1]


def _posterior(rounds: Sequence[Evidence], noise: float) -> tuple[float, Tensor]:
    """(log-likelihood of all updates, log-likelihood ratios of membership) if the noise's variance is `noise`."""
    candidates = len(rounds[0].shifts)
    information = torch.eye(candidates, dtype=torch.float64)
    pull = torch.zeros(candidates, dtype=torch.float64)
    misfit = 0.0
    for one in rounds:
        weights = 1.0 / (one.joining + noise)
        information += (one.shifts * weights) @ one.shifts.T
        pull += one.shifts @ (weights * one.surprise)
        misfit += float((weights * one.surprise.square()).sum() - weights.log().sum())
        misfit += one.rest / noise + one.spare * float(np.log(noise))
    inverse = torch.linalg.inv(information)
    moved = inverse @ pull
    misfit += float(torch.linalg.slogdet(information).logabsdet - pull @ moved)
    return -misfit / 2, 2 * moved / inverse.diagonal()


class Candidates:
    """The lab's own answer to private queries: the mean over all candidates, for it cannot know who is in.

    `added` grows by one (P, d) for each query: every candidate's clipped gradient on the names that travel, with the
    sign and in the units of the update's noise.
    """

    def __init__(self, learner: Learner, public: Params, data: SiteData, plan: StudyPlan) -> None:
        self.learner, self.public = learner, public
        self._data, self._plan = data, plan
        self.added: list[Tensor] = []

    def gradient(self, params: Params, fixed: Params | None = None) -> Params:
        """The mean over candidates of the clipped gradient at `params`."""
        factors = {name: head_factor(name, self._plan) for name in params}
        every = {name: factors[name] * value for name, value in self._by_patient(params, fixed or {}).items()}
        if self._plan.privacy is not None:
            lengths = sum(value.flatten(1).double().square().sum(dim=1) for value in every.values()) ** 0.5
            cut = (self._plan.privacy.clip / lengths.clamp(min=self._plan.privacy.clip)).float()
            every = {name: value * cut.reshape(-1, *[1] * (value.dim() - 1)) for name, value in every.items()}
        flat = torch.cat([every[name].flatten(1) for name in _travelling(params, self._plan)], dim=1)
        self.added.append(-flat / noise_of_a_step(self._plan))
        return {name: value.mean(dim=0) / factors[name] for name, value in every.items()}

    def episode_gradient(self, params: Params, meta_loss: MetaLoss, fixed: Params | None = None) -> Params:
        raise NotImplementedError("this attack follows inner loops of gradient queries")

    def class_sums(self, params: Params) -> ClassSums:
        raise NotImplementedError("this attack follows inner loops of gradient queries")

    def _by_patient(self, params: Params, fixed: Params) -> Params:
        """The mean over each patient's images of the gradient; (P, ...) by name."""
        others = {name: value for name, value in (self.public | fixed).items() if name not in params}

        def loss(own: Params, image: Tensor, target: Tensor) -> Tensor:
            outputs = self.learner.outputs(others | own, image.unsqueeze(0))
            return self.learner.task.loss(outputs, target.unsqueeze(0)).squeeze(0)

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=_CHUNK)
        gradients = each(params, self._data.inputs(), self._data.targets)
        _, patient, images = torch.unique(self._data.patients, return_inverse=True, return_counts=True)
        return {name: _means(value, patient, images) for name, value in gradients.items()}


def _means(rows: Tensor, patient: Tensor, images: Tensor) -> Tensor:
    total = rows.new_zeros(len(images), *rows.shape[1:]).index_add_(0, patient, rows)
    return total / images.to(rows).reshape(-1, *[1] * (rows.dim() - 1))


def attack(plan: StudyPlan, start: Params, data: SiteData, rounds: Sequence[tuple[Params, Params]]) -> Tensor:
    """Log-likelihood ratios of all patients of `data`, from (parameters sent, update received) of every round.

    `start` are the parameters that began the study; `plan` has one training site.
    """
    (site,) = plan.training_sites
    network = build_model(plan.model, plan.task, ways=data.ways)
    template = parameters(network)
    learner, public = Learner(network, task_of(plan, site)), template | select(start, template.keys() & start.keys())
    head = zeros_like(select(template, head_names(network, plan.model)))
    algorithm, kept, found = ALGORITHMS[plan.algorithm.name], head, []
    for sent, received in rounds:
        lab = Candidates(learner, public, data, plan)
        local = algorithm.local_update(sent, kept, lab, plan.algorithm)
        kept = local.kept if algorithm.keeps else head
        scaled = in_units_of_noise(received, plan)
        update = torch.cat([scaled[name].flatten() for name in _travelling(scaled, plan)])
        averaged = plan.privacy is None
        found.append(evidence_of(update, torch.stack(lab.added), sample_rate=plan.sampling.sample_rate, mean=averaged))
    return log_likelihood_ratios(found, noise=0.0 if plan.privacy is None else float(plan.algorithm.inner_steps))


def in_units_of_noise(update: Params, plan: StudyPlan) -> Params:
    """An update, each number divided by the deviation of one step's noise in it; without privacy by rate / B."""
    (site,) = plan.training_sites
    batch, loop = plan.sampling.sample_rate * plan.sites[site].patients, inner_loop(plan.algorithm)
    step = noise_of_a_step(plan)
    return {
        name: value * (batch * head_factor(name, plan) / (rate(name, loop) * step)) for name, value in update.items()
    }


def noise_of_a_step(plan: StudyPlan) -> float:
    """z C, what the sum of clipped gradients is blurred by; 1 without privacy, where there is no unit."""
    cost = plan_cost(plan, plan.training_sites[0])
    return 1.0 if cost is None or plan.privacy is None else cost.noise_multiplier * plan.privacy.clip


def head_factor(name: str, plan: StudyPlan) -> float:
    """What a gradient is multiplied by before it is clipped."""
    return plan.privacy.head_scale if plan.privacy is not None and name.startswith(HEAD) else 1.0


def _travelling(params: Params, plan: StudyPlan) -> list[str]:
    return sorted(name for name in params if plan.model.head == "shared" or not name.startswith(HEAD))
