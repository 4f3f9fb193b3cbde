"""What must hold between the fields of a plan. Each rule takes the fields it needs, by name, and yields mistakes.

A rule whose fields are not all valid is left out, so that one mistake does not cause a report of others. `known_sites`
are the sites whose labels and role are valid; `sites` is there only if all are, and rules read nothing else of a site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from common.validation import Mistake, nearest

if TYPE_CHECKING:
    from common.plan import EvaluationSpec, ModelSpec, OuterSpec, PrivacySpec, SiteSpec

Sites = Mapping[str, "SiteSpec"]
LabelSets = Mapping[str, list[str]]


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
    if model.head == "shared" and len(set(ways.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in ways.items())
        what = f"model.head is 'shared', but the sites differ in their number of labels: {counts}"
        yield Mistake(("model", "head"), what, "use 'site', or label sets of one size")


def precision_has_noise(outer: OuterSpec, privacy: PrivacySpec | None) -> Iterator[Mistake]:
    """Weights by noise need noise."""
    if outer.weights == "precision" and privacy is None:
        what = "outer.weights is 'precision', which weighs by the noise, but the plan has no privacy"
        yield Mistake(("outer", "weights"), what, "use 'equal' or 'patients'")


RULES = (
    labels_are_known,
    quorum_is_reachable,
    left_out_sites_exist,
    head_is_trainable,
    shared_head_fits,
    precision_has_noise,
)


def _training(sites: Sites) -> list[str]:
    return [name for name, site in sites.items() if site.role == "train"]
