"""From a YAML file to a checked pydantic model, or to every problem at once with file and line."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from common.errors import Problem, UsageError
from common.yaml_lines import Location, YamlDocument

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """Closed keys, no coercion (a whole number may stand for a decimal one), frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


@dataclass(frozen=True)
class Mistake:
    """Something wrong between several fields: the field to blame, what, and what to do."""

    location: Location
    what: str
    remedy: str = ""


class Inconsistent(ValueError):
    """A validator's way to name several mistakes, each at its own place below the validated value."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("; ".join(mistake.what for mistake in mistakes))


Rule = Callable[..., Iterable[Mistake]]  # its parameters' names say which fields it compares


def broken_rules(rules: Iterable[Rule], fields: Mapping[str, Any]) -> list[Mistake]:
    """The mistakes found by those rules whose fields are all there."""
    found: list[Mistake] = []
    for rule in rules:
        wanted = inspect.signature(rule).parameters
        if fields.keys() >= wanted.keys():
            found += rule(**{name: fields[name] for name in wanted})
    return found


def valid_fields(model: type[BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    """The values of those fields of `model` that are valid by themselves in `data`, or absent with a default."""
    values = {}
    for name, spec in model.model_fields.items():
        with contextlib.suppress(ValidationError):
            if name in data:
                values[name] = TypeAdapter(spec.rebuild_annotation()).validate_python(data[name], strict=True)
            elif not spec.is_required():
                values[name] = spec.get_default(call_default_factory=True, validated_data={})
    return values


def validate(
    document: YamlDocument,
    model: type[Model],
    error: type[UsageError],
    between_fields: Callable[[dict[str, Any]], Iterable[Mistake]] = lambda data: (),
) -> Model:
    """Check `document` against `model`.

    `between_fields(data)` finds mistakes between the fields of a document in which some field is wrong by itself:
    pydantic leaves the model's own validator out then, and the user would learn of them one run later.

    Raises `error` with one Problem per mistake: file:line, the value, and what is allowed.
    """
    if document.data is None:
        raise error(Problem(document.where(()), "the file is empty"))
    if not isinstance(document.data, dict):
        raise error(Problem(document.where(()), "the file must hold a mapping of keys to values"))
    try:
        return model.model_validate(document.data)
    except ValidationError as failure:
        items = failure.errors(include_url=False)
        problems = [problem for item in items for problem in _problems(document, model, item)]
        if any(item["loc"] for item in items):
            problems += [_located(document, mistake) for mistake in between_fields(document.data)]
        raise error(sorted(problems, key=lambda problem: int(problem.where.rpartition(":")[2]))) from None


def nearest(value: object, allowed: Iterable[str]) -> str:
    """'did you mean ...?' if one of `allowed` is close to `value`, and what is allowed."""
    names = [str(name) for name in allowed]
    return f"{_guess(value, names)}allowed: {', '.join(names) or 'nothing'}"


def _guess(value: object, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def _located(document: YamlDocument, mistake: Mistake) -> Problem:
    return Problem(document.where(mistake.location), mistake.what, mistake.remedy)


def _problems(document: YamlDocument, model: type[BaseModel], item: Any) -> Iterator[Problem]:
    """The problems behind one of pydantic's error items."""
    location: Location = tuple(item["loc"])
    raised = item.get("ctx", {}).get("error")
    if isinstance(raised, Inconsistent):
        for mistake in raised.mistakes:
            yield _located(document, Mistake((*location, *mistake.location), mistake.what, mistake.remedy))
        return
    name = ".".join(str(part) for part in location if part != "[key]")
    where = document.where(location)
    if item["type"] == "extra_forbidden":
        yield Problem(where, f"unknown key {name!r}", nearest(location[-1], _keys_at(model, location[:-1])))
    elif item["type"] == "missing":
        yield Problem(where, f"{name!r} is missing", "add it")
    elif not location:
        yield Problem(where, _requirement(item))
    else:
        yield Problem(where, f"{name} is {_shown(item['input'])}: {_requirement(item)}", _remedy(item))


def _requirement(item: Any) -> str:
    """pydantic's message in our words."""
    if item["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return "must be a mapping of keys to values"
    if item["type"] in ("bool_type", "bool_parsing"):
        return "must be true or false"
    if item["type"] == "int_type":
        return "must be a whole number"
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be a valid ", "must be a ").replace("Input should be ", "must be ")
    return message[:1].lower() + message[1:]


def _remedy(item: Any) -> str:
    if item["type"] == "literal_error":
        return _guess(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"])).rstrip()
    if item["type"] in ("string_type", "invalid_key") and isinstance(item["input"], bool | int | float):
        return "put it in quotes to make it text"
    if item["type"] in ("int_type", "float_type", "bool_type") and isinstance(item["input"], str):
        return "write it without quotes, units or separators"
    return ""


def _shown(value: object) -> str:
    return "empty" if value is None else reprlib.repr(value)


def _keys_at(model: type[BaseModel], location: Location) -> list[str]:
    """The keys that `model` allows at `location`."""
    current: Any = model
    for part in location:
        owner = next((m for m in _models(current) if str(part) in m.model_fields), None)
        if owner is not None:
            current = owner.model_fields[str(part)].annotation
        # else: a mapping's or a list's item, whose type stands in the same annotation
    return sorted({key for owner in _models(current) for key in owner.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that `annotation` mentions."""
    inner = get_args(annotation)
    if inner:
        return [model for argument in inner for model in _models(argument)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
