"""SiteConfig: the hospital's own YAML, `site.yaml` in the site's folder."""

from __future__ import annotations

import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from client.ledger import Terms
from common.accounting import filter_order
from common.errors import DataError, UsageError
from common.names import Name
from common.plan import AlgorithmName, TaskKind
from common.validation import Strict, validate
from common.yaml_lines import read_yaml

SITE_FILE = "site.yaml"
CHUNK_IMAGES = 64  # that go through the network at once, where the site says nothing


def _stays_inside(value: str) -> str:
    path = PurePosixPath(value)
    if not value or path.is_absolute() or ".." in path.parts:
        raise ValueError("give a path inside the site's folder, relative to it")
    return value


Orientation = Literal["fixed", "free"]  # free: no up or left, as on slides: a quarter turn or flip changes nothing
Port = Annotated[int, Field(ge=1, le=65535)]
InsidePath = Annotated[str, AfterValidator(_stays_inside)]


class Budget(Strict):
    """What the hospital's patients bear in total, over all studies."""

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    mode: Literal["plan", "filter"] = "plan"  # filter: also for studies whose parameters follow earlier releases

    @model_validator(mode="after")
    def _bears_something(self) -> Budget:
        self.terms()
        return self

    def terms(self) -> Terms:
        """What the site's ledger is opened with."""
        order = filter_order(epsilon=self.epsilon, delta=self.delta) if self.mode == "filter" else None
        return Terms(epsilon=self.epsilon, delta=self.delta, order=order)


class Limits(Strict):
    """What the hospital allows at all; a plan outside is refused before anybody is asked to approve it."""

    epsilon_per_study: Annotated[float, Field(gt=0)] | None = None
    min_patients: Annotated[int, Field(ge=1)] = 1  # that a plan declares for this site
    tasks: list[TaskKind] | None = None
    algorithms: list[AlgorithmName] | None = None
    hours: str | None = None  # "19:00-07:00", the hospital's own clock
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None  # of the worker
    memory_gb: Annotated[float, Field(gt=0)] | None = None  # of the worker

    @field_validator("hours")
    @classmethod
    def _a_span_of_hours(cls, value: str | None) -> str | None:
        if value is not None:
            _opening(value)
        return value

    @property
    def opening(self) -> tuple[datetime.time, datetime.time]:
        """From and to; across midnight where the first is the later one."""
        return _opening(self.hours or "00:00-23:59")


class Hardware(Strict):
    """How the site uses its machine. No result depends on it, but for rounding."""

    chunk_images: Annotated[int, Field(ge=1, le=65536)] = CHUNK_IMAGES  # at once through the network: bounds memory
    bf16: bool = False  # convolutions and products in bfloat16; norms, clipping and noise never are


def _opening(hours: str) -> tuple[datetime.time, datetime.time]:
    start, _, end = hours.partition("-")
    try:
        span = datetime.time.fromisoformat(start.strip()), datetime.time.fromisoformat(end.strip())
    except ValueError:
        raise ValueError('write from and to as "19:00-07:00"') from None
    if span[0].tzinfo or span[1].tzinfo:
        raise ValueError("the hours are the hospital's own: leave the time zone out")
    if span[0] == span[1]:
        raise ValueError("the hours begin when they end: leave them out to allow any time")
    return span


class SiteConfig(Strict):
    """One hospital: where its images are, and what it allows."""

    name: Name
    manifest: InsidePath | None = None  # a CSV: path,label,patient
    npz: InsidePath | None = None  # images, labels, patient_ids; or MedMNIST's form
    label_map: dict[str, str] = {}  # the hospital's label -> the plan's label
    phantom: bool = False  # drawn images, no patient's
    orientation: Orientation = "fixed"
    device: Literal["cpu", "cuda", "auto"] = "auto"
    hardware: Hardware = Hardware()
    state: InsidePath = "state"  # folder of the ledger and the stored releases
    budget: Budget
    limits: Limits = Limits()
    peers: dict[Name, str] = {}  # other sites' fingerprints, compared by telephone: whose masks a secure sum may carry
    verified_install: bool = True  # the worker starts only if its files are those of the installed wheel
    node_user: str | None = None  # who may ask the worker, beside the worker's own user
    health_port: Port | None = None  # loopback: grpc.health.v1
    metrics_port: Port | None = None  # loopback: Prometheus

    @field_validator("label_map", mode="before")
    @classmethod
    def _codes_as_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {str(label) if type(label) is int else label: meaning for label, meaning in value.items()}

    @model_validator(mode="after")
    def _one_source(self) -> SiteConfig:
        if (self.manifest is None) == (self.npz is None):
            raise ValueError("give exactly one of 'manifest' (a CSV file) and 'npz'")
        return self


def load_site_config(folder: Path) -> SiteConfig:
    """Read and check `folder`/site.yaml.

    Raises DataError with every problem at once, each with file and line.
    """
    try:
        document = read_yaml(folder / SITE_FILE)
    except UsageError as error:
        raise DataError(error.problems) from None
    return validate(document, SiteConfig, DataError)
