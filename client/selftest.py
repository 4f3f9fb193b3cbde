"""The step self-test: is a private query of this very installation what the ledger charges it as?

The real queries (`client.private_data`, `client.optimizer`) are asked about a site that is drawn: canary patients of
four images, each with a contribution of 100 times the clip in a random direction of its own; bystanders whose gradient
hangs on the head; and a patient whose gradient is no number. Each release has every canary in or out by a coin.

The attack learns one threshold for each canary on half of the releases and is counted on the other half; what it gets
right proves a mu, by Clopper-Pearson, against the claimed mu = 1/z. Directions are orthogonal and the declared noise
has no direction, so the canaries of one release are as many independent trials; their rates may be averaged, although
each has a threshold of its own, since the claimed trade-off is convex. What the declared contributions leave of the
releases must be the declared noise: its squares sum to a chi-square. Every question is asked twice, and so do the
squares of the differences: noise that comes again would cancel there.

A right installation FAILs with probability 4 * DOUBT a query kind at most: two bounds and two chi-squares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from scipy.special import gammainc, gammaincc
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from client.audit_bounds import mu_lower_bound
from client.data.dataset import SiteData
from client.grant import Grant
from client.optimizer import os_generator
from client.private_data import Mechanism, Patients, PrivateDataset
from common.errors import SelfTestFailed
from common.files import write_atomically
from common.models import Network
from common.params import Params
from common.tasks import Task

FAILED = "selftest.failed"  # in the site's state folder

DOUBT = 1e-8  # of a verdict FAIL; also the size of the chi-square test
_SHOWN_DOUBT = 0.05  # of the bound that is shown, and that has to reach half of the claim

_CANARIES, _IMAGES, _RELEASES = 32, 4, 56
_BYSTANDERS = 8
_BYSTANDER, _BROKEN = _CANARIES, _CANARIES + 1  # their labels; those of canaries are their numbers
_SIDE, _PIXELS, _LENGTH = 8, 64, 16.0  # of a picture; pixels become -2 or 2 in `common.images`
NOISE, CLIP, _BATCH, _RADIUS = 0.5, 0.7, 101.0, 2.0  # z, C, B, R: all unlike 1, so that a factor left out shows

Verdict = Literal["PASS", "INCONCLUSIVE", "FAIL"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """What came of one kind of query."""

    query: str
    verdict: Verdict
    claimed: float  # mu = 1/z
    shown: float  # mu that the attack proves, with 95 % confidence a rate
    certain: float  # the same with confidence 1 - DOUBT
    noise: float  # std of what is not declared contribution, in units of the declared std
    why: str = ""

    def line(self) -> str:
        """As text."""
        found = f"mu at least {self.shown:.2f} of {self.claimed:.2f} claimed, noise {self.noise:.3f} of the declared"
        return f"{self.verdict:12} {self.query}: {self.why or found}"


@functools.cache
def self_test() -> tuple[Check, ...]:
    """Every query kind that costs little, once for each process."""
    return tuple(run_self_test())


def require_self_test(state: Path | None = None) -> tuple[Check, ...]:
    """The checks. Raises SelfTestFailed if one FAILs: nothing may be released then.

    A FAIL stays in the folder `state`, and blocks until a person takes it away: a fault that shows now and then must
    not get through because the worker is started again and again.
    """
    if state is not None and (state / FAILED).exists():
        raise SelfTestFailed(f"{(state / FAILED).read_text()}\n(found before; mended? then remove {state / FAILED})")
    checks = self_test()
    if failed := "\n".join(check.line() for check in checks if check.verdict == "FAIL"):
        if state is not None:
            write_atomically(state / FAILED, failed.encode())
        raise SelfTestFailed(failed)
    return checks


def run_self_test() -> Iterator[Check]:
    """One check for each kind of query."""
    world = _World()
    for query, ask, directions, constant in (
        ("gradient", world.gradient, *world.gradient_parts()),
        ("class_sums", world.class_sums, *world.class_sum_parts()),
        ("statistic", world.statistic, *world.statistic_parts()),
    ):
        yield examined(query, lambda ask=ask: world.releases(ask), directions, constant)  # type: ignore[misc]


def examined(
    query: str,
    asked: Callable[[], tuple[Tensor, Tensor]],
    directions: Tensor,
    constant: Tensor,
    *,
    z: float = NOISE,
    blind: bool = False,
) -> Check:
    """The check of releases (R, d) in units of the sensitivity, under coins bool (R, K): each is `constant` (d,) and
    the `directions` (K, d), orthonormal, of those who are in, and Normal(0, z^2). What cannot be asked FAILs.

    `blind`: what lies along the directions has a spread of its own, and a coin need not be seen there.
    """
    try:
        releases, coins = asked()
    except Exception as error:
        return _failed(query, f"the query broke off ({type(error).__name__}: {error})", 1 / z)
    if not bool(torch.isfinite(releases).all()):
        return _failed(query, "a release is not finite: whose gradient is no number shows", 1 / z)
    rest = releases - constant
    seen = rest @ directions.T
    hits = attacked(seen, coins)
    shown, certain = (mu_lower_bound(**hits, doubt=doubt) for doubt in (_SHOWN_DOUBT, DOUBT))
    noise = (rest - (seen if blind else coins.double()) @ directions) / z
    count = noise.numel() - (seen.numel() if blind else 0)
    size, twice = _deviation(noise, count), _deviation((noise[::2] - noise[1::2]) / 2**0.5, count // 2)
    verdict: Verdict = "PASS"
    why = ""
    if certain > 1 / z:
        verdict, why = "FAIL", f"a patient can be told: mu is {certain:.2f} or more, {1 / z:.2f} is claimed"
    elif _unlike_noise(twice, count // 2):
        verdict, why = "FAIL", f"the same question again has noise of {twice:.3f} of the declared std between answers"
    elif _unlike_noise(size, count):
        verdict, why = "FAIL", f"not the declared sum and noise: what is left has {size:.3f} of the declared std"
    elif shown < 0.5 / z and not blind:
        verdict, why = "INCONCLUSIVE", f"the canaries are hardly seen: mu {shown:.2f} of {1 / z:.2f} claimed"
    return Check(query=query, verdict=verdict, claimed=1 / z, shown=shown, certain=certain, noise=size, why=why)


def _deviation(noise: Tensor, count: int) -> float:
    """Of `count` degrees of freedom."""
    return math.sqrt(float(noise.square().sum()) / count)


def _unlike_noise(deviation: float, count: int) -> bool:
    """Whether standard normal numbers have such a deviation with probability below DOUBT."""
    energy = deviation**2 * count / 2
    return 2 * min(float(gammainc(count / 2, energy)), float(gammaincc(count / 2, energy))) < DOUBT


def attacked(observed: Tensor, coins: Tensor) -> dict[str, int]:
    """Errors on the second half of (R, K) observations, each canary's threshold in the middle of its first half."""
    half = len(coins) // 2
    before, known = observed[:half], coins[:half].double()
    inside = (before * known).sum(0) / known.sum(0)
    outside = (before * (1 - known)).sum(0) / (1 - known).sum(0)
    guess, truth = observed[half:] > (inside + outside) / 2, coins[half:]
    return {
        "false_alarms": int((guess & ~truth).sum()),
        "absent": int((~truth).sum()),
        "misses": int((~guess & truth).sum()),
        "present": int(truth.sum()),
    }


def balanced_coins(releases: int, canaries: int) -> Tensor:
    """bool (releases, canaries), random; two releases in turn have the same ones. Each canary is in half of the first
    half, and in half of the second. `releases` is a multiple of 8."""
    generator, pairs = os_generator(), releases // 4
    halves = [torch.rand(pairs, canaries, generator=generator).argsort(dim=0) < pairs // 2 for _ in range(2)]
    return torch.cat(halves).repeat_interleave(2, dim=0)


class _World:
    """The drawn site; a public zero head over the pixels themselves, one output for each label."""

    def __init__(self) -> None:
        generator = os_generator()
        signs = torch.sign(torch.rand(_PIXELS, generator=generator) - 0.5)
        order = torch.randperm(_PIXELS, generator=generator)
        self._patterns: Tensor = _hadamard(_PIXELS)[order] * signs  # +-1, orthogonal
        self._answers: Tensor = _hadamard(_CANARIES) * torch.sign(torch.rand(_CANARIES, generator=generator) - 0.5)
        labels = [*range(_CANARIES), *[_BYSTANDER] * _BYSTANDERS, _BROKEN]
        images = [_IMAGES] * _CANARIES + [1] * (_BYSTANDERS + 1)
        counts = torch.tensor(images)
        rows = torch.repeat_interleave(torch.tensor(labels), counts)
        self._data = SiteData(
            site="drawn",
            images=((self._patterns[rows] + 1) * 127.5).to(torch.uint8).reshape(-1, 1, _SIDE, _SIDE),
            labels=rows,
            patients=torch.repeat_interleave(torch.arange(len(labels)), counts),
            label_names=tuple(str(label) for label in range(_BROKEN + 1)),
            patient_ids=tuple(str(patient) for patient in range(len(labels))),
            split=("train",) * int(counts.sum()),
        )
        self._network = Network(nn.Flatten(), nn.Linear(_PIXELS, _BROKEN + 1, bias=False))
        self._head: Params = {"head.weight": torch.zeros(_BROKEN + 1, _PIXELS)}
        self._task = Task(loss=_loss, score=lambda outputs, targets: torch.zeros(len(targets)))

    def releases(self, ask: Callable[[PrivateDataset], Tensor]) -> tuple[Tensor, Tensor]:
        """(releases (R, d), coins (R, K)). torch's own seed is the same before each: noise from it would repeat."""
        coins = balanced_coins(_RELEASES, _CANARIES)
        everyone = torch.ones(_BYSTANDERS + 1, dtype=torch.bool)
        found = []
        with torch.random.fork_rng(devices=[]):
            for coin in coins:
                torch.manual_seed(0)
                found.append(ask(self._private(torch.cat([coin, everyone]))).double().flatten())
        return torch.stack(found), coins

    def _private(self, inside: Tensor) -> PrivateDataset:
        rows = torch.nonzero(inside[self._data.patients]).flatten()
        mechanism = Mechanism(
            sample_rate=1.0,
            noise_multiplier=NOISE,
            clip=CLIP,
            batch=_BATCH,
            max_images=_IMAGES,
            feature_clip=_RADIUS,
        )
        patients = Patients(self._data.rows(rows), self._network, self._task, chunk_images=32)
        return PrivateDataset(patients, mechanism, Grant(1))

    def gradient(self, private: PrivateDataset) -> Tensor:
        """In units of C."""
        return private.gradient(self._head)["head.weight"] * (_BATCH / CLIP)

    def gradient_parts(self) -> tuple[Tensor, Tensor]:
        """A canary's loss is its own output; a bystander's the cross-entropy, under a head that is public."""
        pull = torch.full((_BROKEN + 1,), 1 / (_BROKEN + 1), dtype=torch.float64)
        pull[_BYSTANDER] -= 1
        bystander = torch.outer(pull / pull.norm(), self._picture(_BYSTANDER))
        return self._rows([self._picture(n) for n in range(_CANARIES)], _PIXELS), bystander.flatten() * _BYSTANDERS

    def class_sums(self, private: PrivateDataset) -> Tensor:
        """In units of the sensitivity, 1."""
        sums = private.class_sums({})
        return torch.cat([sums.features / _RADIUS, sums.counts.unsqueeze(1)], dim=1) * (_BATCH / 2**0.5)

    def class_sum_parts(self) -> tuple[Tensor, Tensor]:
        """A patient's features, far longer than R, and its share of images, in the row of its label."""
        whole = [torch.cat([self._picture(n), torch.ones(1)]) / 2**0.5 for n in range(_BROKEN + 1)]
        every = self._rows(whole, _PIXELS + 1)
        return every[:_CANARIES], every[_BYSTANDER] * _BYSTANDERS + every[_BROKEN]

    def statistic(self, private: PrivateDataset) -> Tensor:
        """In units of sqrt(k)/2."""
        answers = torch.cat([(self._answers + 1) / 2, torch.full((1, _CANARIES), 0.5)])
        table = torch.cat([answers, torch.full((1, _CANARIES), math.nan)])
        released = private.statistic({}, lambda outputs, targets: table[targets])
        return (released - 0.5) * (2 * _BATCH / math.sqrt(_CANARIES))

    def statistic_parts(self) -> tuple[Tensor, Tensor]:
        """A canary answers 0 or 1 to each of k questions, a bystander 1/2."""
        return self._answers.double() / math.sqrt(_CANARIES), torch.zeros(_CANARIES, dtype=torch.float64)

    def _picture(self, label: int) -> Tensor:
        """Of length 1, float64."""
        picture: Tensor = self._patterns[label].double() * (2 / _LENGTH)
        return picture

    def _rows(self, values: list[Tensor], width: int) -> Tensor:
        """(len(values), labels * width): the n-th in the n-th label's row."""
        placed = torch.zeros(len(values), _BROKEN + 1, width, dtype=torch.float64)
        for number, value in enumerate(values):
            placed[number, number] = value
        return placed.flatten(1)


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    own = outputs.gather(1, targets.unsqueeze(1)).squeeze(1) * (100 * CLIP / _LENGTH)
    losses = torch.where(targets < _CANARIES, own, cross_entropy(outputs, targets, reduction="none"))
    return losses * torch.where(targets == _BROKEN, math.nan, 1.0)


def _failed(query: str, why: str, claimed: float) -> Check:
    return Check(query=query, verdict="FAIL", claimed=claimed, shown=0.0, certain=0.0, noise=math.nan, why=why)


def _hadamard(size: int) -> Tensor:
    """(size, size) of +-1 with orthogonal rows (Sylvester); `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix
