"""From folders of public images to the warm-start file that a plan names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from common.checkpoint import save_checkpoint
from common.errors import Problem, UsageError
from common.plan import load_plan
from server.pretrain import PublicSet, pretrain
from server.simulation import load_public, site_folders


def make_warm_start(file: Path, sites: Path, out: Path | None, *, avoid: Path | None, steps: int, seed: int) -> Path:
    """Pre-train the plan's body on the public sets below `sites`; returns the file written.

    Public images that are, pixel by pixel, also a hospital's below `avoid` are left out: collections overlap, and a
    hospital's patient is not public because somebody published the film.

    Raises PlanError, DataError, or UsageError if neither `out` nor the plan names the file.
    """
    plan = load_plan(file)
    target = out or (file.parent / plan.model.warm_start if plan.model.warm_start else None)
    if target is None:
        raise UsageError(Problem(str(file), "model.warm_start names no file to write", "add it, or give --out"))
    hospitals = site_folders(avoid).values() if avoid else ()
    taken = {image for folder in hospitals for image in _pixels(load_public(folder, plan))}
    sets = [_without(taken, load_public(folder, plan)) for folder in site_folders(sites).values()]
    body = pretrain(
        sets,
        plan.model,
        plan.task,
        steps=steps,
        seed=seed,
        each_step=lambda numbers: track(numbers, "Pre-training", console=Console(stderr=True)),
    )
    names = ", ".join(public.name for public in sets)
    images = sum(len(public.labels) for public in sets)
    origin = {"study": plan.study, "public": names, "images": images, "steps": steps, "seed": seed}
    save_checkpoint(target, body, {key: str(value) for key, value in origin.items()})
    return target


def _pixels(public: PublicSet) -> list[bytes]:
    return [image.numpy().tobytes() for image in public.images]


def _without(taken: set[bytes], public: PublicSet) -> PublicSet:
    keep = torch.tensor([image not in taken for image in _pixels(public)])
    return replace(public, images=public.images[keep], labels=public.labels[keep])
