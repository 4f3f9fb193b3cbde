"""StudyPlan: the one YAML that the lab writes, every site approves, and every computation follows.

The plan is public inside the federation. Whatever it fixes (declared patients, clip, rates, rounds) may be
known to everybody; nothing else about a site's data may be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from common.errors import PlanError, UsageError
from common.findings import FINDINGS_BETWEEN, NO_FINDING
from common.names import Name
from common.plan_rules import EPISODIC, RULES
from common.validation import Inconsistent, Mistake, Strict, broken_rules, valid_fields, validate
from common.yaml_lines import read_yaml


def _whole(value: Any) -> Any:
    if type(value) is not int:  # a Literal of numbers takes True for 1
        raise ValueError("must be a whole number")
    return value


def _none_if_said(value: Any) -> Any:
    if value is None:
        raise ValueError("write 'privacy: none' for a simulation without privacy, or give epsilon")
    if isinstance(value, str) and value != "none":
        raise ValueError("must be 'none', or a mapping with epsilon")
    return None if value == "none" else value


def _require_proximal(name: str, proximal: float) -> None:
    if (proximal > 0) != (name in _PULLED):
        what = f"proximal is {proximal:g} and name is {name!r}"
        among = " and ".join(_PULLED)
        raise Inconsistent([Mistake(("proximal",), what, f"it must be above 0 for {among}, and is for them only")])


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Label = Annotated[str, Field(min_length=1)]
Labels = Annotated[list[Label], Field(min_length=1)]
Trainable = Literal["all", "film", "head", "mapping"]
AlgorithmName = Literal[
    "reptile",
    "fomaml",
    "maml",
    "anil",
    "metasgd",
    "protonet",
    "prototypes",
    "mapping",
    "fedavg",
    "fedprox",
    "mrmtl",
    "local_only",
    "transfer",
]
TaskKind = Literal["classification", "multilabel", "segmentation", "anomaly"]
_PULLED = ("fedprox", "mrmtl")


class TaskSpec(Strict):
    """What the images are and which labels exist.

    The first label of a segmentation is the background, that of an anomaly study is healthy.
    """

    kind: TaskKind
    image_size: Annotated[Literal[16, 28, 32, 48, 64, 96, 128, 224], BeforeValidator(_whole)] = 64  # pixels, square
    channels: Annotated[Literal[1, 3], BeforeValidator(_whole)] = 1
    label_sets: dict[Name, list[Label]] = Field(min_length=1)  # label space by name; order gives the class index
    modalities: list[Label] = []  # the network's normalisation layers are conditioned on them

    @field_validator("label_sets")
    @classmethod
    def _labels(cls, value: dict[str, list[str]], others: ValidationInfo) -> dict[str, list[str]]:
        mistakes = []
        for name, labels in value.items():
            if len(labels) < (1 if others.data.get("kind") == "multilabel" else 2):
                mistakes.append(Mistake((name,), f"task.label_sets.{name} is {labels}", "give at least two labels"))
            for index, label in enumerate(labels):
                if others.data.get("kind") == "multilabel" and (label == NO_FINDING or FINDINGS_BETWEEN in label):
                    what = f"task.label_sets.{name} names a finding {label!r}"
                    allowed = f"'{NO_FINDING}' says no finding, '{FINDINGS_BETWEEN}' separates two"
                    mistakes.append(Mistake((name, index), what, allowed))
                if label in labels[:index]:
                    mistakes.append(Mistake((name, index), f"task.label_sets.{name} names {label!r} twice", "keep one"))
        if mistakes:
            raise Inconsistent(mistakes)
        return value


class RowFilter(Strict):
    """Which images make up a task: those whose known details match; None matches any, known or not."""

    modality: Labels | None = None
    sex: Labels | None = None
    scanner: Labels | None = None
    min_age: Annotated[float, Field(ge=0)] | None = None  # years
    max_age: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _some_age(self) -> RowFilter:
        if self.min_age is not None and self.max_age is not None and self.min_age > self.max_age:
            what = f"min_age {self.min_age:g} is above max_age {self.max_age:g}"
            raise Inconsistent([Mistake(("min_age",), what, "no patient is both")])
        return self


class SiteSpec(Strict):
    """What the lab and the federation know of one site."""

    labels: str  # a key of task.label_sets
    patients: PositiveInt  # declared and public: N, the enrolled patients whose images train
    role: Literal["train", "held_out"] = "train"
    where: RowFilter | None = None  # a personalised task: only these images
    prevalence: list[Fraction] | None = None  # declared and public share of each label; rarer labels then weigh more

    @field_validator("prevalence")
    @classmethod
    def _sums_to_one(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and abs(sum(value) - 1) > 0.01:
            raise ValueError(f"the shares sum to {sum(value):g}; they must sum to 1")
        return value


class ModelSpec(Strict):
    """The network; GroupNorm only (BatchNorm mixes patients)."""

    name: Literal["conv4", "resnet", "unet", "autoencoder"] = "conv4"
    width: Annotated[int, Field(ge=8, le=256, multiple_of=8)] = 32
    trainable: Trainable = "film"  # film: GroupNorm scale and shift; mapping: the network that sets them
    head: Literal["site", "shared"] = "site"
    warm_start: str | None = None  # safetensors file, relative to the plan's folder


class AlgorithmSpec(Strict):
    """What a site does in a round; `common.algorithms` has one file per name."""

    name: AlgorithmName = "reptile"
    inner_steps: Annotated[int, Field(ge=1, le=100)] = 5
    inner_lr: PositiveFloat = 0.1
    head_lr: PositiveFloat | None = None  # None: inner_lr
    proximal: Annotated[float, Field(ge=0)] = 0.0  # the pull to the shared parameters: FedProx's mu, MR-MTL's lambda
    meta_steps: Annotated[int, Field(ge=1, le=100)] = 2  # meta-gradients a round, where the gradient is an episode's
    meta_lr: PositiveFloat = 0.1  # their rate
    episodes: Annotated[int, Field(ge=1, le=1000)] = 8  # m of an episode query; each joining patient is in one

    @model_validator(mode="after")
    def _proximal_only_where_pulled(self) -> AlgorithmSpec:
        _require_proximal(self.name, self.proximal)
        return self


class SecureSumSpec(Strict):
    """Updates are masked so that the lab sees their sum alone (`common.secure_sum`)."""

    range: Annotated[float, Field(gt=0, le=2**20)] = 16.0  # numbers of an update are cut to +-range


class OuterSpec(Strict):
    """The server optimiser, applied to the weighted mean of the sites' updates (Reddi 2021)."""

    optimizer: Literal["sgd", "momentum", "adam", "yogi"] = "sgd"
    lr: PositiveFloat = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # momentum; beta1 of adam and yogi
    weights: Literal["equal", "patients", "precision", "score"] = "equal"  # precision: B^2/z^2; score: model weighting
    secure_sum: SecureSumSpec | None = None


class SamplingSpec(Strict):
    """Who joins a query, with privacy and without."""

    sample_rate: Fraction = 0.2  # q: each patient joins independently with this probability
    max_images_per_patient: PositiveInt = 4  # M
    views: Annotated[int, Field(ge=1, le=16)] = 1  # random views of each image, averaged inside the patient; 1: none


class PrivacySpec(Strict):
    """Patient-level differential privacy of everything that a site releases in this study."""

    unit: Literal["patient"] = "patient"
    epsilon: PositiveFloat
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None  # None ("auto"): 1/(10 N) of each site
    clip: PositiveFloat = 1.0
    head_scale: PositiveFloat = 1.0  # below 1 the body gets more of the clip, and the head more noise
    feature_clip: PositiveFloat = 2.0  # the longest feature vector that enters a class sum
    noise_multiplier: PositiveFloat | None = None  # None: solved from epsilon
    noise: Literal["normal", "discrete"] = "normal"  # discrete: exact, on a lattice; slower (client.discrete_noise)
    monitor: bool = True  # one more query a round: the private accuracy behind the learning curve

    @field_validator("delta", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return None if value == "auto" else value


class AdaptationSpec(Strict):
    """How a new hospital adapts an initialization to its own question (local; nothing leaves)."""

    trainable: Literal["all", "film", "head"] = "all"
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    lr: PositiveFloat = 0.1
    head_lr: PositiveFloat | None = None


class ComparisonSpec(Strict):
    """Another algorithm that the study is measured against; what is left out is as in the study itself."""

    name: AlgorithmName
    label: Name | None = None  # of its arm; the algorithm's name, if left out
    inner_steps: Annotated[int, Field(ge=1, le=100)] | None = None
    inner_lr: PositiveFloat | None = None
    head_lr: PositiveFloat | None = None
    proximal: Annotated[float, Field(ge=0)] = 0.0
    meta_steps: Annotated[int, Field(ge=1, le=100)] | None = None
    meta_lr: PositiveFloat | None = None
    episodes: Annotated[int, Field(ge=1, le=1000)] | None = None
    trainable: Trainable | None = None  # of the model
    outer: OuterSpec | None = None
    adaptation: AdaptationSpec | None = None

    @model_validator(mode="after")
    def _proximal_only_where_pulled(self) -> ComparisonSpec:
        _require_proximal(self.name, self.proximal)
        return self

    @property
    def arm(self) -> str:
        return self.label or self.name

    def model(self, own: ModelSpec) -> ModelSpec:
        """The network that it trains, beside a study with the network `own`."""
        usual: Trainable = "film" if own.trainable == "mapping" else own.trainable
        trainable = "mapping" if self.name == "mapping" else usual
        return own.model_copy(update={"trainable": self.trainable or trainable})

    def algorithm(self, own: AlgorithmSpec) -> AlgorithmSpec:
        """The settings that it runs with, beside a study with the settings `own`."""
        settings = own.model_dump() | {"name": self.name, "proximal": self.proximal}
        given = {name: getattr(self, name) for name in settings}
        return AlgorithmSpec(**settings | {name: value for name, value in given.items() if value is not None})


def _from_names(value: Any) -> Any:
    return [{"name": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


class EvaluationSpec(Strict):
    """What a simulation measures after the last round, and against what."""

    shots: list[PositiveInt] = Field(default=[1, 5, 10], min_length=1)  # images per class; segmentation: images
    splits: Annotated[int, Field(ge=2, le=50)] = 5  # random splits of a site's patients into support and query pools
    draws: Annotated[int, Field(ge=1, le=100)] = 4  # support sets drawn in each split
    adaptation: AdaptationSpec = AdaptationSpec()
    compare: Annotated[list[ComparisonSpec], BeforeValidator(_from_names)] = [ComparisonSpec(name="fedavg")]
    without_privacy: bool = False
    ceiling: bool = True  # also train on every support patient: what could be reached at all
    leave_one_out: list[str] = []  # sites left out in turn, each in a federation of its own
    subgroups: dict[Name, RowFilter] = {}  # personalised tasks: measured at every target that has such images
    fuse: Literal["image", "patient"] = "image"  # patient: one answer for each, fused late over images and modalities
    curve_points: Annotated[int, Field(ge=0, le=20)] = 4  # checkpoints evaluated for the learning curve

    @property
    def lead_shots(self) -> int:
        """The shots that headline and learning curve speak of: the middle one, so that nobody picks the best."""
        return sorted(self.shots)[len(self.shots) // 2]


class StudyPlan(Strict):
    """A whole study. `digest` identifies it."""

    study: Name
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    task: TaskSpec
    sites: dict[Name, SiteSpec] = Field(min_length=1)
    model: ModelSpec = ModelSpec()
    algorithm: AlgorithmSpec = AlgorithmSpec()
    outer: OuterSpec = OuterSpec()
    rounds: Annotated[int, Field(ge=1, le=10_000)]
    quorum: PositiveInt
    round_timeout_s: PositiveFloat = 600.0
    sampling: SamplingSpec = SamplingSpec()
    privacy: Annotated[PrivacySpec | None, BeforeValidator(_none_if_said)]  # None ("none"): simulation only, and marked
    evaluation: EvaluationSpec = EvaluationSpec()

    @model_validator(mode="after")
    def _consistent(self) -> StudyPlan:
        fields = {**dict(self), "known_sites": self.sites, "label_sets": self.task.label_sets}
        mistakes = broken_rules(RULES, fields)
        if mistakes:
            raise Inconsistent(mistakes)
        return self

    @property
    def monitored(self) -> bool:
        """Whether a site's reply carries a private score of the adapted parameters; episodes leave none to score."""
        wanted = self.outer.weights == "score" if self.privacy is None else self.privacy.monitor
        return wanted and self.algorithm.name not in EPISODIC

    @cached_property
    def training_sites(self) -> tuple[str, ...]:
        return tuple(name for name, site in self.sites.items() if site.role == "train")

    @property
    def held_out_sites(self) -> tuple[str, ...]:
        return tuple(name for name, site in self.sites.items() if site.role == "held_out")

    def labels_of(self, site: str) -> tuple[str, ...]:
        """The site's label space, in class-index order."""
        return tuple(self.task.label_sets[self.sites[site].labels])

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, every default spelled out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `to_json()`, hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other fields; what was computed from the old ones stays behind."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("training_sites", "digest"):
            copy.__dict__.pop(name, None)
        return copy


def load_plan(path: Path) -> StudyPlan:
    """Read and check a study plan.

    Raises PlanError with every problem at once, each with file and line.
    """
    try:
        document = read_yaml(path)
    except UsageError as error:
        raise PlanError(error.problems) from None
    return validate(document, StudyPlan, PlanError, _between_fields)


def _between_fields(data: dict[str, Any]) -> list[Mistake]:
    """The rules that can be judged although some field is wrong by itself."""
    fields = valid_fields(StudyPlan, data)
    if isinstance(sites := data.get("sites"), dict):
        fields["known_sites"] = {str(name): site for name, raw in sites.items() if (site := _judgeable(raw))}
        if len(fields["known_sites"]) == len(sites):
            fields["sites"] = fields["known_sites"]
    if isinstance(task := data.get("task"), dict) and isinstance(sets := task.get("label_sets"), dict):
        fields["label_sets"] = {name: labels for name, labels in sets.items() if isinstance(labels, list)}
    return broken_rules(RULES, fields)


def _judgeable(raw: object) -> SiteSpec | None:
    """A site of which only labels and role are surely valid."""
    fields = valid_fields(SiteSpec, raw) if isinstance(raw, dict) else {}
    return SiteSpec.model_construct(**fields) if fields.keys() >= {"labels", "role"} else None


def plan_from_json(text: str) -> StudyPlan:
    """The plan that `StudyPlan.to_json` wrote; `privacy: null` there means none.

    Raises pydantic's ValidationError (a ValueError) if the text is not such a plan.
    """
    data = json.loads(text)
    if isinstance(data, dict) and data.get("privacy", "") is None:
        data["privacy"] = "none"
    return StudyPlan.model_validate(data)
