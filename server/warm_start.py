"""From folders of public images to the warm-start file that a plan names."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from common.checkpoint import save_checkpoint
from common.errors import Problem, UsageError
from common.plan import StudyPlan, load_plan
from server.meta_train import meta_train
from server.pretrain import Steps, pretrain
from server.public_episodes import sets_with_tasks
from server.public_sets import PublicSet
from server.simulation import load_public, site_folders
from server.task_encoder import needs_encoder, train_encoder


def make_warm_start(
    file: Path, sites: Path, out: Path | None, *, avoid: Path | None, steps: int, meta_steps: int = 0, seed: int
) -> Path:
    """Pre-train the plan's body on the public sets below `sites`; returns the file written.

    Then `meta_steps` steps of meta-training, and the task encoder where the plan trains a mapping. Public images that
    are, pixel by pixel, also a hospital's below `avoid` are left out: collections overlap, and a hospital's patient is
    not public because somebody published the film.

    Raises PlanError, DataError, or UsageError if neither `out` nor the plan names the file, or the public sets do not
    teach what is asked for.
    """
    plan = load_plan(file)
    target = out or (file.parent / plan.model.warm_start if plan.model.warm_start else None)
    if target is None:
        raise UsageError(Problem(str(file), "model.warm_start names no file to write", "add it, or give --out"))
    sets = _public_sets(sites, avoid, plan)
    if meta_steps or needs_encoder(plan):
        sets_with_tasks(sets, plan)  # or raise now, before minutes of pre-training
    tensors = pretrain(sets, plan, steps=steps, seed=seed, each_step=_shown("Pre-training"))
    origin: dict[str, object] = {
        "study": plan.study,
        "public": ", ".join(public.name for public in sets),
        "images": sum(map(len, sets)),
        "steps": steps,
        "meta_steps": meta_steps,
        "seed": seed,
    }
    if meta_steps:
        tensors |= meta_train(tensors, sets, plan, steps=meta_steps, seed=seed, each_step=_shown("Meta-training"))
    if needs_encoder(plan):
        encoder, retrieved = train_encoder(tensors, sets, plan, seed=seed, each_step=_shown("Task encoder"))
        tensors |= encoder
        origin["encoder_retrieval"] = f"{retrieved:.3f}"
    save_checkpoint(target, tensors, {key: str(value) for key, value in origin.items()})
    return target


def _shown(title: str) -> Steps:
    return lambda numbers: track(numbers, title, console=Console(stderr=True))


def _public_sets(sites: Path, avoid: Path | None, plan: StudyPlan) -> list[PublicSet]:
    hospitals = site_folders(avoid).values() if avoid else ()
    taken = {image for folder in hospitals for image in _pixels(load_public(folder, plan))}
    return [_without(taken, load_public(folder, plan)) for folder in site_folders(sites).values()]


def _pixels(public: PublicSet) -> list[bytes]:
    return [image.numpy().tobytes() for image in public.images]


def _without(taken: set[bytes], public: PublicSet) -> PublicSet:
    keep = torch.tensor([image not in taken for image in _pixels(public)])
    return public.rows(keep.nonzero().flatten())
