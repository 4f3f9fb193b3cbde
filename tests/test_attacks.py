"""The attacks on planted truth: near perfect where nothing hides, at chance in noise, exact where a closed form is."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.func import functional_call

from client.data.load import load_site
from client.data.phantoms import make_phantom_sites
from common.accounting import plan_cost
from common.errors import PlanError
from common.params import Params
from common.plan import StudyPlan
from deploy.benchmarks.attacks import at_epsilon, candidates_of, favourable, judged, most_true_positives, receive
from deploy.benchmarks.inversion import best, fitted, invert, likeness
from deploy.benchmarks.membership import attack, evidence_of, in_units_of_noise, log_likelihood_ratios
from server.start import initial_parameters

ROOT = Path(__file__).parents[1]
STUDY = {
    "study": "tiny",
    "task": {"kind": "classification", "image_size": 16, "label_sets": {"lesion": ["healthy", "lesion"]}},
    "sites": {"alder": {"labels": "lesion", "patients": 10}},
    "model": {"name": "conv4", "width": 8},
    "algorithm": {"name": "reptile", "inner_steps": 2},
    "rounds": 2,
    "quorum": 1,
    "sampling": {"sample_rate": 0.5},
    "privacy": {"epsilon": 3, "clip": 0.15, "monitor": False},
}


def rng_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def auroc(scores: Tensor, inside: Tensor) -> float:
    return float((scores[inside].unsqueeze(1) > scores[~inside]).double().mean())


def planted(seed: int, *, noise: float, size: float = 1.0, rate: float = 1.0, rounds: int = 1) -> tuple[Tensor, Tensor]:
    """(log-likelihood ratios, who is in) of 40 candidates in 60 dimensions, two steps a round."""
    rng = rng_of(seed)
    inside = torch.randperm(40, generator=rng) < 20
    found = []
    for _ in range(rounds):
        steps = size * torch.randn(2, 40, 60, generator=rng)
        joined = (torch.rand(2, 40, generator=rng) < rate) & inside
        update = (steps * joined.unsqueeze(2)).sum(dim=(0, 1)) + noise * torch.randn(60, generator=rng)
        found.append(evidence_of(update, steps, sample_rate=rate, mean=False))
    return log_likelihood_ratios(found, noise=noise**2), inside


def test_without_noise_everyone_is_found() -> None:
    scores, inside = planted(0, noise=0.0)
    assert torch.equal(scores > 0, inside)


def test_who_joins_by_chance_is_found_over_several_rounds() -> None:
    once, often = ([auroc(*planted(seed, noise=0.1, rate=0.5, rounds=n)) for seed in range(5)] for n in (1, 8))
    assert np.mean(often) > 0.95 > np.mean(once) > 0.6


def test_in_noise_alone_it_is_at_chance() -> None:
    found = [auroc(*planted(seed, noise=1.0, size=1e-4)) for seed in range(50)]
    assert np.mean(found) == pytest.approx(0.5, abs=4 * np.std(found) / 50**0.5)


@pytest.mark.parametrize("size", [60, 20], ids=["wide", "narrow"])
def test_the_ratio_is_that_of_two_gaussians(size: int) -> None:
    """In against out, all others by coins, from the covariance as it stands; `wide` goes through candidates' span."""
    rng = rng_of(4)
    steps, update = torch.randn(1, 30, size, generator=rng, dtype=torch.float64), torch.randn(size, generator=rng)
    noise = 1000.0  # above the update's mean square: nothing is estimated
    found = log_likelihood_ratios([evidence_of(update, steps, sample_rate=1.0, mean=False)], noise=noise)
    centred = steps[0] - steps[0].mean(dim=0)
    seen = update.double() - 0.5 * steps[0].sum(dim=0)
    for number, own in enumerate(centred):
        others = torch.cat([centred[:number], centred[number + 1 :]])
        covariance = noise * torch.eye(size, dtype=torch.float64) + 0.25 * others.T @ others
        gaussian = torch.distributions.MultivariateNormal(torch.zeros(size, dtype=torch.float64), covariance)
        expected = gaussian.log_prob(seen - 0.5 * own) - gaussian.log_prob(seen + 0.5 * own)
        assert float(found[number]) == pytest.approx(float(expected), abs=1e-9)


def test_orthogonal_candidates_are_told_apart_as_well_as_two_gaussians_are() -> None:
    """Shift s in unit noise: AUROC Phi(s / sqrt 2)."""
    shift, found, rng = 1.5, [], rng_of(1)
    for _ in range(60):
        inside = torch.randperm(40, generator=rng) < 20
        steps = shift * torch.eye(40).unsqueeze(0)
        update = shift * inside + torch.randn(40, generator=rng)
        scores = log_likelihood_ratios([evidence_of(update, steps, sample_rate=1.0, mean=False)], noise=1.0)
        found.append(auroc(scores, inside))
    expected = 0.5 * math.erfc(-shift / 2)
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / 60**0.5)


def test_a_real_hospital_without_privacy_has_no_secrets_and_under_epsilon_1_it_has(make_site) -> None:
    """The worker's own updates. One patient more or less is what the lab computed, or nobody would be found."""
    plan = StudyPlan.model_validate(STUDY)
    candidates = load_site(make_site("alder", patients=20, images=2), plan)
    inside = torch.arange(20) % 2 == torch.arange(20) // 10  # of both labels alike
    rows = torch.nonzero(inside[candidates.patients]).flatten()
    found = {}
    for epsilon in (math.inf, 1.0):
        own = at_epsilon(favourable(plan), epsilon)
        start = initial_parameters(own, Path())
        start["head.weight"] = torch.randn(start["head.weight"].shape, generator=rng_of(0))
        rounds = receive(own, candidates.rows(rows), start)
        assert len(rounds) == 2
        found[epsilon] = auroc(attack(own, start, candidates, rounds), inside)
    assert found[math.inf] == 1.0
    assert found[1.0] < 0.85  # the bound is 0.63; ten against ten vary by 0.13


def test_an_update_under_privacy_is_in_units_of_its_noise(make_site) -> None:
    """A step whose gradients are far below the noise has unit deviation: rates, B, C, z and head_scale are right."""
    study = STUDY | {"privacy": {"epsilon": 0.2, "clip": 0.15, "head_scale": 0.1, "monitor": False}, "rounds": 1}
    plan = favourable(StudyPlan.model_validate(study))
    start = initial_parameters(plan, Path())
    ((_, update),) = receive(plan, load_site(make_site("alder", patients=10), plan), start)
    scaled = in_units_of_noise(update, plan)
    body = torch.cat([value.flatten() for name, value in scaled.items() if name.startswith("body.")])
    assert float(body.std()) == pytest.approx(1.0, abs=0.05)
    assert float(scaled["head.weight"].std()) == pytest.approx(1.0, abs=0.4)


def test_rates_by_hand() -> None:
    plan = at_epsilon(StudyPlan.model_validate(STUDY), math.inf)
    members = np.array([[True, True, False, False]] * 3)
    perfect = judged(plan, "own", math.inf, np.where(members, 1.0, 0.0) + np.arange(4) / 100, members)
    assert (perfect.auroc.mean, perfect.auroc.low, perfect.auroc.high) == pytest.approx((1.0, 1.0, 1.0))
    assert [rate.mean for rate in perfect.true_positives] == [1.0, 1.0]
    mixed = judged(plan, "own", math.inf, np.array([[4.0, 2.0, 3.0, 1.0]]), members[:1])
    assert mixed.auroc.mean == pytest.approx(0.75)
    assert mixed.true_positives[0].mean == 0.5  # one of the two before the first who is out
    assert mixed.by_definition == mixed.by_profile == [1.0, 1.0]


def test_the_bound_is_that_of_one_gaussian() -> None:
    """TPR = Phi(Phi^-1(FPR) + 1/z) is what the best test reaches, and no bound may be below it, or far above."""
    study = STUDY | {"rounds": 1, "sampling": {"sample_rate": 1.0}}
    study |= {"algorithm": {"name": "reptile", "inner_steps": 1}}
    plan = StudyPlan.model_validate(study)
    cost = plan_cost(plan, "alder")
    assert cost is not None
    rates = np.array([0.01, 0.05, 0.3])
    normal = torch.special.ndtri(torch.from_numpy(rates)) + 1 / cost.noise_multiplier
    exact = torch.special.ndtr(normal).numpy()
    found = most_true_positives(plan, rates)
    assert (found >= exact - 1e-6).all()
    assert found == pytest.approx(exact, abs=0.01)
    assert (found <= np.exp(cost.epsilon) * rates + cost.delta + 1e-3).all()


class _Linear(nn.Module):
    """Pixels to logits: the gradient of row i of the weights is delta_i x, that of its bias delta_i."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.layer(inputs.flatten(1))
        return logits


def linear_gradient(inputs: Tensor) -> Params:
    torch.manual_seed(0)
    network = _Linear()
    leaves = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    loss = nn.functional.cross_entropy(functional_call(network, leaves, (inputs,)), torch.tensor([1]))
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), create_graph=True), strict=True))


def test_inversion_finds_the_image_where_a_closed_form_does() -> None:
    original = torch.rand(1, 1, 8, 8, generator=rng_of(2))
    gradient = linear_gradient((original - 0.5) / 0.25)
    closed = gradient["layer.weight"][0] / gradient["layer.bias"][0] * 0.25 + 0.5
    assert torch.allclose(closed.reshape(original.shape), original, atol=1e-4)
    target = {name: value.detach() for name, value in gradient.items()}
    (found,) = invert(linear_gradient, target, original.shape, steps=200, smoothness=[0.0], rng=rng_of(0))
    assert likeness(found[0], original[0]).psnr > 35
    noise = {name: torch.randn(value.shape, generator=rng_of(5)) for name, value in target.items()}
    (blind,) = invert(linear_gradient, noise, original.shape, steps=200, smoothness=[0.0], rng=rng_of(0))
    assert likeness(fitted(blind[0], original[0]), original[0]).psnr < 15


def test_likeness_is_blind_to_brightness_and_contrast_only() -> None:
    original, other = (torch.rand(1, 16, 16, generator=rng_of(seed)) for seed in (0, 1))
    dimmed = 0.3 * original + 0.2
    assert likeness(fitted(dimmed, original), original).psnr > 60
    assert likeness(fitted(dimmed, original), original).ssim == pytest.approx(1.0, abs=1e-3)
    assert likeness(fitted(other, original), original).psnr < 15
    assert torch.equal(best([other, dimmed], original), fitted(dimmed, original))
    negative = fitted(1 - original, original)  # a negative is no likeness: nothing but the mean is left of it
    assert torch.allclose(negative, original.mean().expand_as(original), atol=1e-5)


def test_what_cannot_be_attacked_is_refused_at_once(make_site) -> None:
    folders = {"alder": make_site("alder", patients=12)}
    with pytest.raises(PlanError, match="12 training patients, and 20 candidates are needed"):
        candidates_of(StudyPlan.model_validate(STUDY), folders)
    with pytest.raises(PlanError, match="--sites: has no site 'alder'"):
        candidates_of(StudyPlan.model_validate(STUDY), {})
    wrong = STUDY | {"algorithm": {"name": "anil"}, "privacy": "none"}
    with pytest.raises(PlanError, match=r"anil is not followed step by step[\s\S]*privacy: is none"):
        candidates_of(StudyPlan.model_validate(wrong), folders)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_script_writes_tables_and_a_picture(tmp_path: Path) -> None:
    make_phantom_sites(tmp_path / "sites", names=["alder"], patients=20, image_size=16, test_fraction=0)
    sets = {"lesion": ["normal", "nodule"]}
    study = STUDY | {"task": {"kind": "classification", "image_size": 16, "label_sets": sets}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "deploy.benchmarks.attacks", "study.yaml", "--sites", "sites", "--out", "out"]
    command += ["--runs", "2", "--images", "2", "--steps", "2", "--epsilon", "inf", "--epsilon", "3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "attacks.md").read_text()
    found = re.search(r"\| favourable to the lab \| none \| (\d\.\d+) ", text)
    assert found is not None
    assert float(found[1]) > 0.8
    assert "| `all` travels | epsilon 3 |" in text
    figures = json.loads((tmp_path / "out" / "attacks.json").read_text())
    assert [len(figures[key]) for key in ("membership", "inversion")] == [4, 6]
    assert (tmp_path / "out" / "attacks.png").stat().st_size > 10_000
