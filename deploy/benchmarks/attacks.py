"""What the lab can learn about patients from what it really receives, without privacy and under several epsilons.

    python -m deploy.benchmarks.attacks deploy/studies/attacks.yaml --sites sites/hospitals --out runs/attacks

plays the lab of STUDY towards its one hospital's worker, round by round, and turns the updates against it:

* membership inference (`deploy.benchmarks.membership`): N of 2N candidates are enrolled, drawn anew in each run; the
  lab, which has all images, says how likely each is in. Once by the study's own plan, and once by a plan that favours
  it: the whole network and its head travel, every patient is in every step, one step a round, and the lab chose a start
  under which patients' gradients differ: an untrained network of which few features fire, and a random head.
* gradient inversion (`deploy.benchmarks.inversion`): a hospital of one patient, one step, an untrained network and a
  random head; first the part `film` travels, then the whole network.

Epsilon is what the ledger charges for the whole study. Beside a true positive rate stands the most that privacy leaves,
`e^eps FPR + delta`, and the sharper bound by the mechanism's whole privacy profile (PLD). Both speak of one patient
enrolled or zeroed, all others known; here another one, unknown, is in for each who is out. Intervals are 95 %, by
resampling runs and patients together. It writes OUT/attacks.md, attacks.json and attacks.png.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.func import functional_call

from client.data.dataset import SiteData
from client.data.load import load_site
from client.data.site_folder import SiteImages, write_sites
from client.splits import rng_of
from client.worker import Worker
from common.accounting import plan_cost
from common.command_line import run
from common.errors import PlanError, Problem, RunError
from common.files import write_atomically
from common.models import BODY, HEAD, part_names
from common.params import Params, digest, select, to_arrays, to_tensors
from common.plan import StudyPlan, Trainable, load_plan, plan_from_json
from common.records import PrepareInstruction, SiteReply, TrainInstruction
from common.starting_point import network_of
from common.tasks import task_of
from common.trials import Estimate, interval
from deploy.benchmarks.attack_report import FALSE_POSITIVES, LEFTMOST, Inversion, Membership, draw, markdown
from deploy.benchmarks.inversion import Likeness, best, fitted, invert, likeness
from deploy.benchmarks.membership import attack, head_factor, in_units_of_noise
from server.outer_optimizer import initial_state, outer_step
from server.simulation import site_folders
from server.start import initial_parameters, round_names

EPSILONS = [math.inf, 8.0, 3.0, 1.0]
OWN, FAVOURABLE = "the study's own", "favourable to the lab"

_FOLLOWED = ("reptile", "fedavg")
_SMOOTHNESS = (1.0, 3.0, 10.0)  # of inversion: a try for each
_HEAD = 0.3  # deviation of a head that the lab chooses
_LOWERED = 1.0  # how far it lowers what the normalisation layers add, so that few features fire
_RESAMPLED = 1000
_PROFILE = np.linspace(0.0, 20.0, 201)  # epsilons at which the privacy profile is read

Received = list[tuple[Params, Params]]  # (parameters sent, update received) of each round

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    study: Annotated[Path, typer.Argument(help="The study plan (YAML), of one training site.")],
    sites: Annotated[Path, typer.Option(help="Folder of the sites' folders.")],
    out: Annotated[Path, typer.Option(help="Where the results go.")],
    epsilon: Annotated[list[float], typer.Option(help="Budgets; inf: without privacy.")] = EPSILONS,
    runs: Annotated[int, typer.Option(min=2, help="Runs of each setting, each with other patients in.")] = 6,
    images: Annotated[int, typer.Option(min=2, help="Images to reconstruct.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each reconstruction.")] = 200,
) -> None:
    """Membership inference and gradient inversion against the hospital of STUDY: tables, and a picture."""
    plan = load_plan(study)
    data = candidates_of(plan, site_folders(sites))
    jobs = [(name, e) for name in (OWN, FAVOURABLE) for e in epsilon]
    inferred = [
        membership(plan, study.parent, data, name=name, epsilon=e, runs=runs) for name, e in _told(jobs, "Membership")
    ]
    parts: list[tuple[Trainable, float]] = [(part, e) for part in ("film", "all") for e in epsilon]
    shown = _shown(data, images)
    pictures = {job: reconstructed(plan, shown, *job, steps=steps) for job in _told(parts, "Inversion")}
    inverted = [_inversion(part, e, pictures[part, e], shown) for part, e in parts] + _baselines(shown, data)
    text = markdown(plan, inferred, inverted, runs=runs, images=images, tries=len(_SMOOTHNESS))
    write_atomically(out / "attacks.md", text.encode())
    found = {"membership": [asdict(one) for one in inferred], "inversion": [asdict(one) for one in inverted]}
    write_atomically(out / "attacks.json", json.dumps(_finite(found), indent=1).encode())
    draw(out / "attacks.png", inferred, {e: pictures["all", e] for e in epsilon}, shown)
    Console().print(text, markup=False, soft_wrap=True)
    Console().print(f"Written: {out / 'attacks.md'}, attacks.json, attacks.png", soft_wrap=True)


def candidates_of(plan: StudyPlan, folders: Mapping[str, Path]) -> SiteData:
    """Training images of 2N patients of the plan's one hospital, drawn by the plan's seed.

    Raises PlanError for a plan that cannot be attacked so, or a hospital with too few patients; DataError.
    """
    problems = []
    if len(plan.training_sites) != 1:
        problems.append(Problem("sites", f"{len(plan.training_sites)} sites train", "attack one hospital"))
    if plan.algorithm.name not in _FOLLOWED:
        what = f"{plan.algorithm.name} is not followed step by step"
        problems.append(Problem("algorithm.name", what, f"use one of {', '.join(_FOLLOWED)}"))
    if plan.privacy is None:
        problems.append(Problem("privacy", "is none", "give it; --epsilon inf is the study without"))
    problems += [
        Problem("--sites", f"has no site {name!r}", "give its folder")
        for name in plan.training_sites
        if name not in folders
    ]
    if problems:
        raise PlanError(problems)
    (site,) = plan.training_sites
    data = load_site(folders[site], plan, site=site).of_split("train")
    enrolled, wanted = data.patients.unique(), 2 * plan.sites[site].patients
    if len(enrolled) < wanted:
        what = f"{len(enrolled)} training patients, and {wanted} candidates are needed"
        raise PlanError(Problem(f"site {site}", what, f"set sites.{site}.patients to {len(enrolled) // 2} or fewer"))
    order = torch.randperm(len(enrolled), generator=rng_of(plan.seed, "candidates"))[:wanted]
    return data.rows(torch.nonzero(torch.isin(data.patients, enrolled[order])).flatten())


def at_epsilon(plan: StudyPlan, epsilon: float) -> StudyPlan:
    """The plan with this budget, or without privacy."""
    privacy = None
    if plan.privacy is not None and math.isfinite(epsilon):
        privacy = plan.privacy.model_copy(update={"epsilon": epsilon, "noise_multiplier": None})
    return plan_from_json(plan.model_copy(update={"privacy": privacy}).to_json())


def favourable(plan: StudyPlan) -> StudyPlan:
    """The same hospital under a plan that hides little: nothing stays, nobody is left out, steps are seen singly."""
    return plan.model_copy(
        update={
            "model": plan.model.model_copy(update={"trainable": "all", "head": "shared", "warm_start": None}),
            "algorithm": plan.algorithm.model_copy(update={"name": "fedavg", "inner_steps": 1}),
            "sampling": plan.sampling.model_copy(update={"sample_rate": 1.0}),
        }
    )


def membership(
    plan: StudyPlan, plan_folder: Path, data: SiteData, *, name: str, epsilon: float, runs: int
) -> Membership:
    """Several runs of one plan at one epsilon, and the attack on each."""
    own = at_epsilon(favourable(plan) if name == FAVOURABLE else plan, epsilon)
    patients, scores, members = data.patients.unique(), [], []
    for number in range(runs):
        seeded = own.model_copy(update={"seed": plan.seed + number})
        chosen = torch.randperm(len(patients), generator=rng_of(plan.seed, "members", number))[: len(patients) // 2]
        rows = torch.nonzero(torch.isin(data.patients, patients[chosen])).flatten()
        start = initial_parameters(seeded, plan_folder)
        if name == FAVOURABLE:
            start = _chosen(start, seeded, rng_of(plan.seed, "head", number), lowered=_LOWERED)
        scores.append(attack(seeded, start, data, receive(seeded, data.rows(rows), start)).numpy())
        members.append(np.isin(np.arange(len(patients)), chosen.numpy()))
    return judged(own, name, epsilon, np.array(scores), np.array(members))


def _chosen(start: Params, plan: StudyPlan, rng: torch.Generator, *, lowered: float = 0.0) -> Params:
    """`start` with a random head, and all that the normalisation layers add lowered."""
    (site,) = plan.training_sites
    shifts = {name for name in part_names(network_of(plan, site), "film") if name.endswith(".bias")}
    lower = {name: value - lowered for name, value in start.items() if name in shifts and name.startswith(BODY)}
    head = {name: _HEAD * torch.randn(v.shape, generator=rng) for name, v in start.items() if name.startswith(HEAD)}
    return start | lower | head


def receive(plan: StudyPlan, enrolled: SiteData, start: Params) -> Received:
    """Play the lab: all rounds of `plan` with a worker on these patients, and the plan's server optimiser.

    Raises RunError if the hospital refuses.
    """
    (site,) = plan.training_sites
    with tempfile.TemporaryDirectory() as folder:
        (home,) = write_sites(Path(folder), [(site, _site_images(site, enrolled))])
        worker = Worker(home, state=Path(folder) / "state", simulated=True)
        _accepted(worker.prepare(PrepareInstruction(plan.to_json(), "", "", to_arrays(start))))
        shared = select(start, round_names(plan))
        state, received = initial_state(shared, plan.outer), []
        for number in range(1, plan.rounds + 1):
            sent = TrainInstruction(plan.digest, digest(to_arrays(start)), number, to_arrays(shared))
            update = to_tensors(_accepted(worker.train(sent)).update)
            received.append((shared, update))
            shared, state = outer_step(shared, state, update, plan.outer)
    return received


def _site_images(site: str, data: SiteData) -> SiteImages:
    pixels = data.images.permute(0, 2, 3, 1).numpy()
    return SiteImages(
        name=site,
        images=pixels[..., 0] if pixels.shape[3] == 1 else pixels,
        labels=data.labels.numpy(),
        patients=np.array([data.patient_ids[number] for number in data.patients.tolist()]),
        split=np.array(data.split),
        label_names=data.label_names,
        details=data.details,
    )


def _accepted(reply: SiteReply) -> SiteReply:
    if not reply.ok:
        raise RunError(f"site {reply.site}: {reply.code}: {reply.reason}")
    return reply


def judged(plan: StudyPlan, name: str, epsilon: float, scores: np.ndarray, members: np.ndarray) -> Membership:
    """Rates of scores (runs, patients), where `members` says who was in."""
    once = np.ones(scores.size)
    order = np.argsort(-scores, axis=None)
    inside = members.ravel()[order]
    found = [_rates(inside, weights[order]) for weights in (once, *_resampled(members))]
    values = np.array(found)
    low, high = np.quantile(values[1:], (0.025, 0.975), axis=0)
    estimates = [Estimate(*map(float, row)) for row in zip(values[0], low, high, strict=True)]
    shown = np.concatenate([[0.0], np.geomspace(LEFTMOST, 1.0, 120)])
    at_most = most_true_positives(plan, shown)
    cost = plan_cost(plan, plan.training_sites[0])
    delta = 1.0 if cost is None else cost.delta
    false, true = _roc(inside, once)
    return Membership(
        plan=name,
        epsilon=epsilon,
        noise_multiplier=0.0 if cost is None else cost.noise_multiplier,
        auroc=estimates[0],
        auroc_bound=float(torch.trapezoid(torch.from_numpy(at_most), torch.from_numpy(shown))),
        true_positives=estimates[1:],
        by_definition=[min(1.0, math.exp(min(epsilon, 700.0)) * rate + delta) for rate in FALSE_POSITIVES],
        by_profile=[float(rate) for rate in most_true_positives(plan, np.array(FALSE_POSITIVES))],
        curve=[(float(x), float(y)) for x, y in zip(false, true, strict=True)],
        curve_bound=[(float(x), float(y)) for x, y in zip(shown, at_most, strict=True)],
    )


def _resampled(members: np.ndarray) -> Iterator[np.ndarray]:
    """Weights of draws with replacement of runs and, independently, of patients; somebody is in, and somebody out."""
    rng = np.random.default_rng(0)
    for _ in range(_RESAMPLED):
        runs, patients = (rng.multinomial(size, [1 / size] * size) for size in members.shape)
        weights = np.outer(runs, patients).astype(float)
        if weights[members].any() and weights[~members].any():
            yield weights.ravel()


def _roc(inside: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(FPR, TPR) after each score, from the highest down."""
    true, false = np.cumsum(weights * inside), np.cumsum(weights * ~inside)
    return false / false[-1], true / true[-1]


def _rates(inside: np.ndarray, weights: np.ndarray) -> list[float]:
    """AUROC, and the true positive rate at each of FALSE_POSITIVES."""
    false, true = _roc(inside, weights)
    auroc = float(np.sum(true * np.diff(false, prepend=0.0)))
    places = [int(np.searchsorted(false, rate, side="right")) - 1 for rate in FALSE_POSITIVES]
    return [auroc, *(float(true[place]) if place >= 0 else 0.0 for place in places)]


def most_true_positives(plan: StudyPlan, rates: np.ndarray) -> np.ndarray:
    """The largest true positive rate of any test at each false positive rate, by the plan's whole privacy profile.

    (eps, delta(eps))-privacy for every eps: TPR <= e^eps FPR + delta, and 1 - FPR <= e^eps (1 - TPR) + delta.
    """
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    cost = plan_cost(plan, plan.training_sites[0])
    if cost is None:
        return np.ones_like(rates)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(PoissonSampledDpEvent(cost.sample_rate, GaussianDpEvent(cost.noise_multiplier)), cost.queries)
    deltas = np.array([accountant.get_delta(float(value)) for value in _PROFILE])[:, None]
    growth = np.exp(_PROFILE)[:, None]
    bounds = np.minimum(growth * rates + deltas, 1 - (1 - rates - deltas) / growth)
    most: np.ndarray = bounds.min(axis=0).clip(0.0, 1.0)
    return most


def _shown(data: SiteData, count: int) -> SiteData:
    """The first image of `count` patients, of all labels in turn."""
    by_label = [torch.nonzero(data.labels == label).flatten().tolist() for label in range(data.ways)]
    picked = [rows[number // data.ways] for number, rows in zip(range(count), by_label * count, strict=False)]
    return data.rows(torch.tensor(picked))


def of_one_patient(plan: StudyPlan, part: Trainable, epsilon: float) -> StudyPlan:
    """One patient, one step, the head and `part` of an untrained network travel; delta as in the study."""
    (site,) = plan.training_sites
    cost, privacy = plan_cost(plan, site), plan.privacy
    if cost is None or privacy is None:
        raise ValueError("the plan has no privacy")
    alone = favourable(plan).model_copy(
        update={
            "sites": {site: plan.sites[site].model_copy(update={"patients": 1})},
            "model": plan.model.model_copy(update={"trainable": part, "head": "shared", "warm_start": None}),
            "privacy": privacy.model_copy(update={"delta": cost.delta}),
            "rounds": 1,
        }
    )
    return at_epsilon(alone, epsilon)


def reconstructed(plan: StudyPlan, shown: SiteData, part: Trainable, epsilon: float, *, steps: int) -> list[Tensor]:
    """For each image of `shown` the best picture (C, H, W) that the lab makes of what its hospital releases."""
    alone = of_one_patient(plan, part, epsilon)
    return [_of_one(alone, shown.rows(torch.tensor([row])), steps) for row in range(len(shown))]


def _of_one(plan: StudyPlan, one: SiteData, steps: int) -> Tensor:
    rng = rng_of(plan.seed, "inversion", one.patient_ids[int(one.patients[0])])
    start = _chosen(initial_parameters(plan, Path()), plan, rng)
    ((sent, update),) = receive(plan, one, start)
    target = {name: -value for name, value in in_units_of_noise(update, plan).items()}
    original = one.images[0].float() / 255.0
    gradient = _gradient(plan, one, start | sent)
    tries = invert(gradient, target, (1, *original.shape), steps=steps, smoothness=_SMOOTHNESS, rng=rng)
    return best([picture[0] for picture in tries], original)


def _gradient(plan: StudyPlan, one: SiteData, params: Params) -> Callable[[Tensor], Params]:
    """The gradient at `params` that images with these labels have, as it is scaled before it is clipped."""
    (site,) = plan.training_sites
    network, task = network_of(plan, site), task_of(plan, site)
    names = round_names(plan)
    leaves = {name: params[name].clone().requires_grad_() for name in names}

    def gradient(inputs: Tensor) -> Params:
        loss = task.loss(functional_call(network, params | leaves, (inputs,)), one.targets).mean()
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        return {name: head_factor(name, plan) * value for name, value in zip(names, found, strict=True)}

    return gradient


def _inversion(part: str, epsilon: float | None, pictures: Sequence[Tensor], shown: SiteData) -> Inversion:
    """The likeness of `pictures` to the images of `shown`, mean and interval over them."""
    originals = shown.images.float() / 255.0
    found: list[Likeness] = [likeness(*pair) for pair in zip(pictures, originals, strict=True)]
    return Inversion(part, epsilon, interval([one.psnr for one in found]), interval([one.ssim for one in found]))


def _baselines(shown: SiteData, data: SiteData) -> list[Inversion]:
    """The mean of the other patients' images, and of them the one most like the original."""
    originals, everyone = shown.images.float() / 255.0, data.images.float() / 255.0
    means, nearest = [], []
    for original, patient in zip(originals, shown.patients, strict=True):
        others = everyone[data.patients != patient]
        means.append(fitted(others.mean(dim=0), original))
        nearest.append(best(list(others), original))
    return [
        _inversion("mean of other patients' images", None, means, shown),
        _inversion("nearest other patient's image", None, nearest, shown),
    ]


def _told(jobs: Sequence[Any], title: str) -> Any:
    return track(jobs, title, console=Console(stderr=True))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


if __name__ == "__main__":
    run(app)
