"""SiteConfig: the hospital's own YAML, `site.yaml` in the site's folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from common.errors import DataError, UsageError
from common.names import Name
from common.validation import Strict, validate
from common.yaml_lines import read_yaml

SITE_FILE = "site.yaml"


def _stays_inside(value: str) -> str:
    path = PurePosixPath(value)
    if not value or path.is_absolute() or ".." in path.parts:
        raise ValueError("give a path inside the site's folder, relative to it")
    return value


Orientation = Literal["fixed", "free"]  # free: no up or left, as on slides: a quarter turn or flip changes nothing
InsidePath = Annotated[str, AfterValidator(_stays_inside)]


class Budget(Strict):
    """What the hospital's patients bear in total, over all studies."""

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]


class SiteConfig(Strict):
    """One hospital: where its images are, and what it allows."""

    name: Name
    manifest: InsidePath | None = None  # a CSV: path,label,patient
    npz: InsidePath | None = None  # images, labels, patient_ids; or MedMNIST's form
    label_map: dict[str, str] = {}  # the hospital's label -> the plan's label
    phantom: bool = False  # drawn images, no patient's
    orientation: Orientation = "fixed"
    device: Literal["cpu", "cuda", "auto"] = "auto"
    state: InsidePath = "state"  # folder of the ledger and the stored releases
    budget: Budget

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
