"""The hospital's own question, and the meta-initialization that it starts from.

A META file is a run's checkpoint (with the run's `initial.safetensors` beside it: a round holds only what travels) or
any file that holds a whole body, such as a warm start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint import Checkpoint, load_checkpoint
from common.errors import CheckpointError, Problem, UsageError
from common.models import BODY, build_model, parameters
from common.params import Params, digest, to_arrays
from common.plan import PrivacySpec, SiteSpec, StudyPlan, load_plan, plan_from_json

OWN = "own"  # the name of a label set that no plan has
_INITIAL, _PLAN, _ROUNDS = "initial.safetensors", "plan.json", "round-*.safetensors"  # of a run folder


@dataclass(frozen=True)
class Start:
    """A meta-initialization and where it comes from."""

    params: Params
    digest: str  # SHA-256 of the parameters
    study: str  # digest of the plan that it was learned under; empty if the file names none
    privacy: str  # what its patients were promised, in words


def read_plan(meta: Path, plan: Path | None) -> StudyPlan:
    """The plan in `plan`, or else the one beside the checkpoint.

    Raises PlanError, or UsageError if there is none.
    """
    if plan is not None:
        return load_plan(plan)
    found = _plan_beside(meta)
    if found is None:
        remedy = "name the study with --plan"
        raise UsageError(Problem(str(meta), f"there is no {_PLAN} beside it", remedy))
    return found


def read_start(meta: Path, plan: StudyPlan) -> Start:
    """The whole body in META, which may be a run's folder; for a shared head the head, too.

    Raises CheckpointError if it is missing, broken, incomplete or of another network than the plan's.
    """
    file = _newest_round(meta) if meta.is_dir() else meta
    found = load_checkpoint(file)
    params = _completed(file, found)
    _require_body(file, params, plan)
    whole = digest(to_arrays(params))
    return Start(params, whole, found.metadata.get("plan", ""), _promise(file, found.metadata, plan))


def own_question(plan: StudyPlan, site: str, *, labels: str | None, own: Sequence[str]) -> StudyPlan:
    """The plan with one site, this one, that asks about label set `labels`, or about labels of its `own`.

    Where neither is given: what the plan says of the site, or the plan's only label set. Nothing of it is signed or
    sent; it declares one patient, so that any number of images will do. Raises UsageError.
    """
    sets = plan.task.label_sets
    if own and labels:
        raise UsageError(Problem("--task and --labels", "both are given", "give one: own labels, or a set of the plan"))
    if own:
        least = 1 if plan.task.kind == "multilabel" else 2
        if len(set(own)) < max(least, len(own)):
            raise UsageError(Problem("--task", f"{', '.join(own)!r}", f"give at least {least} different labels"))
        return _asking(plan, site, SiteSpec(labels=OWN, patients=1, role="held_out"), {OWN: list(own)})
    name = labels or (plan.sites[site].labels if site in plan.sites else None)
    if name is None and len(sets) == 1:
        name = next(iter(sets))
    if name is None or name not in sets:
        what = f"the plan has no label set {name!r}" if name else "the plan does not say what this hospital asks"
        remedy = f"--labels {' | '.join(sets)}, or own labels with --task normal,ill"
        raise UsageError(Problem(f"site {site}", what, remedy))
    here = plan.sites.get(site)
    where = here.where if here else None
    return _asking(plan, site, SiteSpec(labels=name, patients=1, role="held_out", where=where), {name: sets[name]})


def _asking(plan: StudyPlan, site: str, spec: SiteSpec, sets: dict[str, list[str]]) -> StudyPlan:
    task = plan.task.model_copy(update={"label_sets": sets})
    return plan.model_copy(update={"task": task, "sites": {site: spec}})


def _newest_round(folder: Path) -> Path:
    rounds = sorted(folder.glob(_ROUNDS))
    if not rounds:
        what = "holds no round of a run"
        raise CheckpointError(
            str(Problem(str(folder), what, "name a checkpoint, or a run folder with round-*.safetensors"))
        )
    return rounds[-1]


def _completed(file: Path, found: Checkpoint) -> Params:
    """With what does not travel, from the run's start, if the file is a round."""
    if "initial" not in found.metadata or file.name == _INITIAL:
        return found.tensors
    initial = load_checkpoint(file.with_name(_INITIAL)).tensors
    if digest(to_arrays(initial)) != found.metadata["initial"]:
        what = "is not what this round's run started from"
        raise CheckpointError(str(Problem(str(file.with_name(_INITIAL)), what, "take both files from one run")))
    return initial | {name: value for name, value in found.tensors.items() if name in initial}


def _require_body(file: Path, params: Params, plan: StudyPlan) -> None:
    fresh = parameters(build_model(plan.model, plan.task, ways=2))
    body = {name: tuple(value.shape) for name, value in fresh.items() if name.startswith(BODY)}
    found = {name: tuple(value.shape) for name, value in params.items() if name.startswith(BODY)}
    wrong = sorted(name for name in body.keys() | found.keys() if body.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        what = f"is of another network: {name} has shape {found.get(name)}, not {body.get(name)}"
        raise CheckpointError(str(Problem(str(file), what, "use the plan that it was made with")))


def _promise(file: Path, metadata: dict[str, str], plan: StudyPlan) -> str:
    if public := metadata.get("public"):
        return f"learned from public images alone ({public}), which have no privacy to lose"
    named = metadata.get("plan")
    if named is None:
        return "not known: the file does not say what it was learned from"
    beside = _plan_beside(file)
    known = next((p for p in (plan, beside) if p is not None and p.digest == named), None)
    if known is None:
        return f"not known: it was learned under plan {named[:12]}, which is not the one given"
    if known.privacy is None:
        return "none: it was learned without privacy, and may give patients away"
    return _in_words(known.privacy, known)


def _in_words(privacy: PrivacySpec, plan: StudyPlan) -> str:
    delta = "1/(10 N)" if privacy.delta is None else f"{privacy.delta:g}"
    return (
        f"patient-level differential privacy at each of {len(plan.training_sites)} training hospitals: "
        f"epsilon at most {privacy.epsilon:g} at delta {delta}, over study {plan.study} ({plan.digest[:12]})"
    )


def _plan_beside(meta: Path) -> StudyPlan | None:
    path = (meta if meta.is_dir() else meta.parent) / _PLAN
    try:
        return plan_from_json(path.read_text())
    except (OSError, ValueError):
        return None
