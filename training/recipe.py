"""Recipes: a TOML file says everything about a run.

Tables: [data] [augment] [fakes] [model] [train] [bundle], each the fields of a frozen dataclass beside the code that
it configures. An ensemble has a table [members.NAME] for each of its networks, which holds what differs, as in
``model.backbone = "legacy_xception"``. What a file leaves out has its default; what is not known is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from dfengine.bundle import Aggregation, DetectorSettings, TrackingSettings
from dfengine.errors import OptionError
from dfengine.sampling import Mode, Policy
from dfengine.settings import from_plain

from .augment import AugmentSettings
from .data import DataSettings
from .errors import RecipeError
from .fakes import FakeSettings
from .models import ModelSettings
from .optimise import TrainSettings


@dataclass(frozen=True, kw_only=True)
class BundleSettings:
    """What goes into bundle.json beside the members and the calibration."""

    name: str = "untitled"
    licence: str = "unstated"
    experimental: bool = True
    sampling: Policy = Policy("uniform", 17)
    sampling_mode: Mode = "reference"
    detector: DetectorSettings = DetectorSettings()
    tracking: TrackingSettings = TrackingSettings()
    aggregation: Aggregation = Aggregation()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One network's recipe."""

    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings()
    fakes: FakeSettings = FakeSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    bundle: BundleSettings = BundleSettings()

    def __post_init__(self) -> None:
        if self.model.mask_head != (self.train.mask_weight > 0):
            raise OptionError(
                f"model.mask_head is {self.model.mask_head} and train.mask_weight {self.train.mask_weight}; a mask is "
                "learned with both or not at all"
            )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """The recipes of a file by the name of their network: one, named after the file, or the members of an ensemble.

    ``overrides``: ``table.key=value`` with a value as in TOML (a word that is none is a text); they win over the file.
    Raises RecipeError, naming the file, the table and the key.
    """
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe cannot be read ({error})", path=path) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"this is no TOML ({error})", path=path) from None
    members = plain.pop("members", None) or {path.stem: {}}
    last: dict[str, Any] = {}
    for text in overrides:
        last = _merge(last, _parse_override(text))
    recipes = {}
    for name, changes in members.items():
        where = f"{path}" if len(members) == 1 else f"{path}, member {name!r}"
        recipes[name] = build_recipe(_merge(_merge(plain, changes), last), where)
    return recipes


def build_recipe(plain: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from plain tables. ``where`` begins the message of a RecipeError."""
    _check_keys(Recipe, plain, where, "")
    try:
        return from_plain(Recipe, plain)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from None


def _check_keys(cls: type, table: Any, where: str, name: str) -> None:
    if not isinstance(table, Mapping):
        raise RecipeError(f"{where}: {name} must be a table, got {table!r}")
    known = {f.name for f in dataclasses.fields(cls)}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"the nearest known is {near[0]!r}" if near else f"known are {', '.join(sorted(known))}"
            raise RecipeError(f"{where}: [{name or 'the top level'}] has an unknown key {key!r}; {hint}")
        hint = get_type_hints(cls)[key]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not hasattr(hint, "parse"):
            _check_keys(hint, value, where, f"{name}.{key}" if name else key)


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {text!r} must have the form table.key=value, as in train.epochs=1")
    try:
        return tomllib.loads(f"{key}={value}")
    except tomllib.TOMLDecodeError:
        pass
    try:  # a text without quotes, which a shell would take away
        return tomllib.loads(f"{key}={value!r}")
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"--set {text!r} cannot be read ({error})") from None


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` wins; tables are merged, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged
