"""What is drawn beside a prediction: nothing stronger than it is, nothing without its words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from client.adapted_model import AdaptedModel, Facts, Support
from client.explain import FULL_COLOUR, explanation, scale_in_words
from client.overlays import Heat, Nearest, Overlay, draw
from client.predict import ANSWERED, UNLIKE, UNSURE, Line, Shown, _nearest, _why
from client.question import own_question
from common import pictures
from common.models import MeanOverImage, build_model, parameters
from common.starting_point import outputs_of
from tests.test_adaptation import plan_of

IMAGE = np.random.default_rng(0).integers(60, 120, (400, 500), dtype=np.uint8)
NEAREST = Nearest(np.full((16, 16), 40, dtype=np.uint8), None, ("support image 3, labelled 'normal'", "distance 0.2"))
HALF = np.zeros((16, 16), dtype=np.float32)
HALF[:, 8:] = 1.0


def overlay_of(**changes: Any) -> Overlay:
    heat = Heat(HALF, "what speaks for 'nodule'", ("left: nothing", "right: 3"))
    told = Overlay(IMAGE, "nodule", True, "probability 0.97", heat, None, (), NEAREST)
    return replace(told, **changes)


def panels(sheet: Image.Image) -> list[np.ndarray]:
    """The three panels of an image of 500 x 400, by where the first one lies."""
    pixels = np.asarray(sheet)
    rows = [y for y in range(pixels.shape[0] - 400) if (pixels[y : y + 400, 16:516, 0] == IMAGE).all()]
    assert len(rows) == 1, "the image is there as it was read, pixel by pixel"
    return [pixels[rows[0] : rows[0] + 400, left : left + 500] for left in (16, 532, 1048)]


def test_heat_lies_where_it_belongs_and_its_scale_is_drawn() -> None:
    image, heated, nearest = panels(draw(overlay_of()))
    np.testing.assert_array_equal(heated[:, :200], image[:, :200])
    assert (heated[:, 300:, 0].astype(int) - image[:, 300:, 0] > 60).all()
    assert (nearest[200, 20] == 40).all()
    empty = replace(overlay_of().heat, values=np.zeros((16, 16), dtype=np.float32))  # type: ignore[type-var]
    _, cold, _ = panels(draw(overlay_of(heat=empty)))
    np.testing.assert_array_equal(cold, image)
    below = np.asarray(draw(overlay_of(heat=empty)))[494:508, 532:1032]
    assert (below[..., 0].astype(int) - below[..., 2] > 80).any(), "the bar has its full colour whatever the image has"


def test_an_image_without_an_answer_is_told_by_words_and_colour() -> None:
    answered, silent = (np.asarray(draw(overlay_of(answered=a))) for a in (True, False))
    assert (answered[:40] != silent[:40]).any()
    assert ((silent[:40] == (230, 159, 0)).all(axis=2)).any()
    assert not ((answered[:40] == (230, 159, 0)).all(axis=2)).any()


def test_each_class_has_its_outline_and_no_answer_has_none() -> None:
    mask = np.zeros((40, 50), dtype=np.uint8)
    mask[5:15, 5:15], mask[20:30, 20:40] = 1, 2
    image, outlined, _ = panels(draw(overlay_of(heat=None, mask=mask, classes=("lung", "heart"))))
    for value, (top, left) in ((1, (50, 50)), (2, (200, 200))):
        np.testing.assert_array_equal(outlined[top : top + 3, left + 20], [pictures.CONTOURS[value - 1]] * 3)
        np.testing.assert_array_equal(outlined[top + 5, left + 20], image[top + 5, left + 20])
    _, bare, _ = panels(draw(overlay_of(heat=None, mask=None, classes=("lung", "heart"))))
    np.testing.assert_array_equal(bare, image)


@pytest.mark.parametrize(("shape", "panel"), [((64, 64), 384), ((3000, 1500), 512), ((480, 640), 640)])
def test_an_image_is_drawn_in_its_own_size_if_that_can_be_seen(shape: tuple[int, int], panel: int) -> None:
    sheet = draw(overlay_of(image=np.zeros(shape, dtype=np.uint8)))
    assert sheet.width == 3 * (max(panel, 384) + 16) + 16


def model_of(kind: str, name: str, temperature: float) -> AdaptedModel:
    task = {"kind": kind, "image_size": 32, "label_sets": {"it": ["normal", "nodule"]}}
    shared = {"head": "shared", "trainable": "all"} if name == "autoencoder" else {}
    plan = plan_of(task=task, model={"name": name, "width": 8} | shared, sites={"a": {"labels": "it", "patients": 10}})
    plan = own_question(plan, "willow", labels="it", own=())
    rng = torch.Generator().manual_seed(1)
    params = parameters(build_model(plan.model, plan.task, ways=outputs_of(plan, "willow")))
    params = {n: v + 0.2 * torch.randn(v.shape, generator=rng) for n, v in params.items()}
    facts = Facts.model_construct(
        site="willow", kind=kind, label_names=["normal", "nodule"], image_size=32, temperature=temperature,
        usual_distance=0.5, healthy_scores=[0.0],
    )  # fmt: skip
    images = torch.randint(0, 256, (4, 1, 32, 32), generator=rng).float()
    targets = torch.tensor([[0.0, 1.0]] * 4) if kind == "multilabel" else torch.tensor([0.0, 1.0, 0.0, 1.0])
    return AdaptedModel(facts, plan, params, Support(images, targets, torch.zeros(4, 1), torch.zeros(0)))


def heat_of(model: AdaptedModel, images: torch.Tensor) -> torch.Tensor:
    inputs = model.inputs(images, torch.zeros(len(images)))
    heat = explanation(model, model.learner, inputs, model.answers(model.learner, inputs))
    assert heat is not None
    return heat


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_weak_evidence_is_drawn_weakly(kind: str) -> None:
    """Ten times the temperature is a tenth of the log-odds, and of the heat; it is no share of the image's own best."""
    images = model_of(kind, "conv4", 1.0).support.images
    strong, weak = (heat_of(model_of(kind, "conv4", t), images) for t in (20.0, 200.0))
    assert 0 < strong.max() < 1
    torch.testing.assert_close(weak, strong / 10)


def test_heat_is_in_calibrated_log_odds() -> None:
    """Against a finite difference: maps that move towards one place's values all over the image."""
    model = model_of("classification", "conv4", 8.0)
    learner, inputs = model.learner, model.inputs(model.support.images[:1], torch.zeros(1))
    seen: list[torch.Tensor] = []
    (pool,) = (module for module in learner.network.modules() if isinstance(module, MeanOverImage))
    pool.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    answers = model.answers(learner, inputs)
    maps, chosen = seen[0], int(answers.argmax())
    centre, gain = (next(v for name, v in model.params.items() if name.endswith(end)) for end in (".centre", ".gain"))

    def log_odds(values: torch.Tensor) -> torch.Tensor:
        features = (torch.nn.functional.normalize(values.mean(dim=(2, 3)), dim=1) - centre) * gain
        logits = learner.head(model.params, features)[0]
        return (logits[chosen] - logits[1 - chosen]) / 8.0

    heat, step = heat_of(model, model.support.images[:1]), 1e-3
    for row, column in ((0, 0), (0, 31), (31, 0), (31, 31)):
        place = maps[:, :, row // 16 : row // 16 + 1, column // 16 : column // 16 + 1].expand_as(maps)
        slope = (log_odds(maps + step * place) - log_odds(maps - step * place)) / (2 * step)
        assert float(heat[0, row, column]) * FULL_COLOUR == pytest.approx(max(float(slope), 0.0), abs=2e-3)
    assert heat.max() > 0.01


@pytest.mark.parametrize("name", ["conv4", "autoencoder"])
def test_what_is_unusual_is_measured_by_the_healthy_support(name: str) -> None:
    model = model_of("anomaly", name, 1.0)
    assert heat_of(model, model.support.images).max() == pytest.approx(1.0)
    alone = heat_of(model, model.support.images[:1]).max()
    assert alone <= 1.0
    assert "support" in scale_in_words(model)[1]


def line_of(status: str, **changes: Any) -> Line:
    shown = Shown("x", IMAGE, IMAGE[None, :32, :32], 0)
    return replace(Line(shown, status, "nodule", 0.8, (0.2, 0.8), 0.7, 1), **changes)


def test_words_say_how_sure_and_what_would_have_been_enough() -> None:
    model = model_of("classification", "conv4", 1.0)
    assert (
        _why(model, line_of(ANSWERED), 0.6)
        == "probability of normal 0.20, nodule 0.80; answered from confidence 0.60 on"
    )
    assert _why(model, line_of(UNSURE), None).endswith("no confidence was found high enough")
    assert _why(model, line_of(UNLIKE), 0.6).endswith("distance 0.70 from the nearest support image, usual up to 0.50")
    assert _nearest(model, line_of(ANSWERED)).words[0] == "support image 1, labelled 'nodule'"
    several = model_of("multilabel", "conv4", 1.0)
    assert _nearest(several, line_of(ANSWERED)).words[0] == "support image 1, labelled 'nodule'"
    odd = model_of("anomaly", "conv4", 1.0)
    assert "more unusual than 97% of the healthy images" in _why(odd, line_of(ANSWERED, shares=(0.97,)), None)
