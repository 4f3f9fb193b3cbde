"""What must hold between the fields of a plan. Each rule takes the fields it needs, by name, and yields mistakes.

A rule whose fields are not all valid is left out, so that one mistake does not cause a report of others. `known_sites`
are the sites whose labels and role are valid; `sites` is there only if all are, and rules read nothing else of a site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from common.validation import Mistake, nearest

if TYPE_CHECKING:
    from common.plan import AlgorithmSpec, EvaluationSpec, ModelSpec, OuterSpec, PrivacySpec, SiteSpec, TaskSpec

Sites = Mapping[str, "SiteSpec"]
LabelSets = Mapping[str, list[str]]

_NETWORKS = {
    "classification": ("conv4", "resnet"),
    "multilabel": ("conv4", "resnet"),
    "segmentation": ("unet",),
    "anomaly": ("conv4", "resnet", "autoencoder"),
}
_CLASSES_ONLY = ("protonet", "prototypes", "mapping")
EPISODIC = ("maml", "anil", "metasgd", "protonet")  # their gradients are of whole episodes
UNSCORED = (*EPISODIC, "local_only", "transfer")  # adapt nothing at a site that a private query could score
_ARMS = ("meta", "random", "ceiling")  # what every report has
LEAST_MASKED, MOST_MASKED = 3, 50  # sites of a secure sum: of two each knows the other's part; every pair makes a mask
_ASKS_NOTHING = ("local_only", "transfer")


def labels_are_known(label_sets: LabelSets, known_sites: Sites) -> Iterator[Mistake]:
    """Every site's label set is one of the task's."""
    for name, site in known_sites.items():
        if site.labels not in label_sets:
            what = f"sites.{name}.labels is {site.labels!r}, which is no key of task.label_sets"
            yield Mistake(("sites", name, "labels"), what, nearest(site.labels, label_sets))


def quorum_is_reachable(sites: Sites, quorum: int) -> Iterator[Mistake]:
    """Some site trains, and a quorum of them can answer."""
    training = _training(sites)
    if not training:
        yield Mistake(("sites",), "no site has role 'train'", "give at least one site that role")
    elif quorum > len(training):
        remedy = f"at most {len(training)}: so many sites have role 'train'"
        yield Mistake(("quorum",), f"quorum is {quorum}", remedy)


def left_out_sites_exist(evaluation: EvaluationSpec, sites: Sites) -> Iterator[Mistake]:
    """Leave-one-out names sites of the plan, each once, and leaves some site to train."""
    for index, name in enumerate(evaluation.leave_one_out):
        location = ("evaluation", "leave_one_out", index)
        if name not in sites:
            yield Mistake(
                location, f"evaluation.leave_one_out names {name!r}, no site of this plan", nearest(name, sites)
            )
        elif name in evaluation.leave_one_out[:index]:
            yield Mistake(location, f"evaluation.leave_one_out names {name!r} twice", "keep one")
        elif _training(sites) == [name]:
            yield Mistake(location, f"without {name!r} no site trains", "leave out another one")


def head_is_trainable(model: ModelSpec) -> Iterator[Mistake]:
    """Something is shared: not the head alone where heads belong to the sites."""
    if model.trainable == "head" and model.head == "site":
        what = "model.trainable is 'head', but heads belong to the sites: nothing would be shared"
        yield Mistake(("model", "trainable"), what, "use 'film' or 'all', or set model.head: shared")


def shared_head_fits(model: ModelSpec, label_sets: LabelSets, sites: Sites) -> Iterator[Mistake]:
    """A shared head has one number of labels, at every site that trains it or starts from it."""
    ways = {site.labels: len(label_sets.get(site.labels, ())) for site in sites.values()}
    if model.head == "shared" and model.name != "autoencoder" and len(set(ways.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in ways.items())
        what = f"model.head is 'shared', but the sites differ in their number of labels: {counts}"
        yield Mistake(("model", "head"), what, "use 'site', or label sets of one size")


def precision_has_noise(outer: OuterSpec, privacy: PrivacySpec | None) -> Iterator[Mistake]:
    """Weights by noise need noise."""
    if outer.weights == "precision" and privacy is None:
        what = "outer.weights is 'precision', which weighs by the noise, but the plan has no privacy"
        yield Mistake(("outer", "weights"), what, "use 'equal' or 'patients'")


def score_is_asked_for(outer: OuterSpec, privacy: PrivacySpec | None, algorithm: AlgorithmSpec) -> Iterator[Mistake]:
    """Weights by score need the query that releases it, and adapted parameters to score."""
    if outer.weights != "score":
        return
    if privacy is not None and not privacy.monitor:
        what = "outer.weights is 'score', but privacy.monitor is false: no score is released"
        yield Mistake(("outer", "weights"), what, "set privacy.monitor: true (one more query a round)")
    if algorithm.name in UNSCORED:
        what = f"outer.weights is 'score', but {algorithm.name} adapts nothing at the site that could be scored"
        yield Mistake(("outer", "weights"), what, "use another rule, or an algorithm as reptile or fedavg")


def secure_sum_fits(
    outer: OuterSpec, privacy: PrivacySpec | None, evaluation: EvaluationSpec, sites: Sites, quorum: int
) -> Iterator[Mistake]:
    """A sum of which no part is seen has no weights and no scores, and enough sites."""
    if outer.secure_sum is None:
        return
    if outer.weights != "equal":
        what = f"outer.weights is {outer.weights!r}, but in a secure sum the lab sees no update that it could weigh"
        yield Mistake(("outer", "weights"), what, "use 'equal', or leave outer.secure_sum out")
    if privacy is not None and privacy.monitor:
        what = "privacy.monitor is true: beside the secure sum every hospital's score would leave by itself"
        yield Mistake(("privacy", "monitor"), what, "set privacy.monitor: false, or leave outer.secure_sum out")
    training = len(_training(sites)) - bool(evaluation.leave_one_out)
    if not LEAST_MASKED <= training <= MOST_MASKED:
        what = f"a secure sum over {training} hospitals" + (", one left out" if evaluation.leave_one_out else "")
        yield Mistake(("outer", "secure_sum"), what, f"have {LEAST_MASKED} to {MOST_MASKED} with role 'train'")
    if quorum < LEAST_MASKED:
        what = f"quorum is {quorum}: the sum of so few says too much of each"
        yield Mistake(("quorum",), what, f"at least {LEAST_MASKED} with outer.secure_sum")


def compared_secure_sums_fit(evaluation: EvaluationSpec, privacy: PrivacySpec | None) -> Iterator[Mistake]:
    """The same of a comparison with an optimiser of its own."""
    for index, other in enumerate(evaluation.compare):
        if other.outer and other.outer.secure_sum and (other.outer.weights != "equal" or (privacy and privacy.monitor)):
            what = "a secure sum with weights or scores that the lab would need to see"
            yield Mistake(("evaluation", "compare", index, "outer"), what, "leave outer.secure_sum out of comparisons")


def network_fits_task(model: ModelSpec, task: TaskSpec) -> Iterator[Mistake]:
    """U-Net segments, an autoencoder finds anomalies, Conv-4 and ResNet do the rest."""
    allowed = _NETWORKS[task.kind]
    if model.name not in allowed:
        what = f"model.name is {model.name!r}, but task.kind is {task.kind!r}"
        yield Mistake(("model", "name"), what, f"use {' or '.join(allowed)}")
    elif model.name == "autoencoder" and model.head == "site":
        what = "model.head is 'site', but an autoencoder's last layer draws the image and belongs to no task"
        yield Mistake(("model", "head"), what, "set model.head: shared")


def algorithm_fits(algorithm: AlgorithmSpec, model: ModelSpec, task: TaskSpec) -> Iterator[Mistake]:
    """Prototypes need classes, the mapping network needs its algorithm, and the algorithm the network."""
    yield from _algorithm_fits(algorithm.name, model.trainable, task, ("algorithm", "name"))


def comparisons_fit(evaluation: EvaluationSpec, model: ModelSpec, task: TaskSpec) -> Iterator[Mistake]:
    """The same for what the study is compared with; and each has an arm of its own."""
    arms: set[str] = set()
    for index, other in enumerate(evaluation.compare):
        location = ("evaluation", "compare", index)
        yield from _algorithm_fits(other.name, other.model(model).trainable, task, location)
        if other.arm in _ARMS:
            what = f"evaluation.compare labels an arm {other.arm!r}, which is the name of another one"
            yield Mistake(location, what, "give another 'label'")
        if other.arm in arms:
            yield Mistake(location, f"evaluation.compare names {other.arm!r} twice", "give one of them another 'label'")
        arms.add(other.arm)


def modalities_fit(algorithm: AlgorithmSpec, model: ModelSpec, task: TaskSpec) -> Iterator[Mistake]:
    """Conv-4 and ResNet can be conditioned on modalities, and each has an episode at least."""
    if not task.modalities:
        return
    if model.name not in ("conv4", "resnet"):
        what = f"task.modalities names {len(task.modalities)}, but a {model.name} is not conditioned on them"
        yield Mistake(("task", "modalities"), what, "leave them out, or use conv4 or resnet")
    if algorithm.episodes < len(task.modalities):
        what = f"algorithm.episodes is {algorithm.episodes}, for {len(task.modalities)} modalities"
        yield Mistake(("algorithm", "episodes"), what, "give at least one episode for each modality")


def fusion_fits(evaluation: EvaluationSpec, task: TaskSpec) -> Iterator[Mistake]:
    """Answers about pixels are not fused over images."""
    if evaluation.fuse == "patient" and task.kind == "segmentation":
        what = "evaluation.fuse is 'patient', but a mask belongs to its image"
        yield Mistake(("evaluation", "fuse"), what, "use 'image'")


def prevalence_fits(label_sets: LabelSets, known_sites: Sites, task: TaskSpec) -> Iterator[Mistake]:
    """One share for each label of the site's own set, in classification."""
    for name, site in known_sites.items():
        if site.prevalence is None:
            continue
        labels = label_sets.get(site.labels, ())
        location = ("sites", name, "prevalence")
        if task.kind != "classification":
            yield Mistake(location, f"task.kind is {task.kind!r}", "leave it out: only classification weighs classes")
        elif len(site.prevalence) != len(labels):
            what = f"{len(site.prevalence)} shares for {len(labels)} labels"
            yield Mistake(location, what, f"give one for each of: {', '.join(labels)}")


def _algorithm_fits(name: str, trainable: str, task: TaskSpec, location: tuple[str | int, ...]) -> Iterator[Mistake]:
    if name in _CLASSES_ONLY and task.kind != "classification":
        what = f"{name} compares images with class means, but task.kind is {task.kind!r}"
        yield Mistake(location, what, "use another algorithm, as reptile")
    elif (name == "mapping") != (trainable == "mapping") and name not in _ASKS_NOTHING:
        what = f"algorithm {name} with trainable {trainable!r}"
        yield Mistake(location, what, "'mapping' is both the algorithm and what it trains: set both, or neither")


RULES = (
    labels_are_known,
    quorum_is_reachable,
    left_out_sites_exist,
    head_is_trainable,
    shared_head_fits,
    precision_has_noise,
    score_is_asked_for,
    secure_sum_fits,
    compared_secure_sums_fit,
    network_fits_task,
    algorithm_fits,
    comparisons_fit,
    modalities_fit,
    fusion_fits,
    prevalence_fits,
)


def _training(sites: Sites) -> list[str]:
    return [name for name, site in sites.items() if site.role == "train"]
