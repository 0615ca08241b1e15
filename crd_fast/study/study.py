"""What a study is: a question, its tasks, its arms. Read from YAML, those that ship from `studies/`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crd_fast.config import Recipe, from_folder, load_recipe
from crd_fast.errors import UserError, did_you_mean
from crd_fast.yaml_files import is_yaml, read_yaml

STUDIES = Path(__file__).parent / "studies"
Overrides = dict[str, Any]  # section.key: value
Name = Annotated[str, Field(pattern=r"^[\w+-][\w.+-]*$")]  # of a folder
SEED = "train.seed"


class Task(BaseModel):
    """One recipe that the arms change, and what is asked of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str  # a name, or a path from the study's folder on
    measure: str  # the held-out metric, without eval/
    judges: list[str] = []  # other held-out metrics of the table, without eval/
    watched: list[str] = []  # metrics of training in the table, of the last iteration
    overrides: Overrides = {}


class Study(BaseModel):
    """The first arm is what the others are compared with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    tasks: dict[Name, Task] = Field(min_length=1)
    arms: dict[Name, Overrides] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    overrides: Overrides = {}  # of every arm, before those of its task

    @model_validator(mode="after")
    def _seeds_are_its_own(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected different ones, got {self.seeds}")
        for overrides in (
            self.overrides,
            *(task.overrides for task in self.tasks.values()),
            *self.arms.values(),
        ):
            if SEED in overrides or "seed" in (overrides.get("train") or {}):
                raise ValueError(f"{SEED}: expected under seeds, got it among the overrides")
        return self

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    task: str
    arm: str
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """The folder of its run, within that of the study."""
        return Path(self.task) / self.arm / f"seed-{self.seed}"


def study_names() -> list[str]:
    """The studies that ship with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load_study(source: str) -> Study:
    """From a file, or by the name of one that ships. Raises UserError, one line."""
    path = Path(source)
    if not is_yaml(path) and not path.exists():
        path = STUDIES / f"{source}.yaml"
        if not path.exists():
            near = did_you_mean(source, study_names()) or f"; known: {', '.join(study_names())}"
            raise UserError(f"study: no file or study called {source!r}{near}")
    try:
        study = Study.model_validate(read_yaml(path))
    except ValidationError as error:
        mistake = error.errors()[0]
        where = ".".join(map(str, mistake["loc"]))
        if mistake["type"] == "value_error":  # our own, which says what it got
            raise UserError(f"{path}: {mistake['ctx']['error']}") from None
        raise UserError(f"{path}: {where}: {mistake['msg']}, got {mistake['input']!r}") from None
    tasks = {
        name: task.model_copy(update={"recipe": str(from_folder(path.parent, task.recipe))})
        for name, task in study.tasks.items()
    }
    study = study.model_copy(update={"tasks": tasks})
    for cell in cells(study):  # every arm's settings are checked before the first one runs
        if cell.seed != study.seeds[0]:
            break
    return study


def cells(study: Study) -> Iterator[Cell]:
    """All runs, seed by seed, so that what was interrupted compares arms with one another."""
    for seed in study.seeds:
        for name, task in study.tasks.items():
            for arm, changes in study.arms.items():
                every = (study.overrides, task.overrides, changes, {SEED: seed})
                overrides = [_override(key, value) for values in every for key, value in values.items()]
                yield Cell(name, arm, seed, load_recipe(task.recipe, overrides))


def _override(key: str, value: Any) -> str:
    """As on a command line. Raises UserError for what JSON, which is YAML, has no form for."""
    try:
        return f"{key}={json.dumps(value, ensure_ascii=False)}"
    except TypeError:
        raise UserError(
            f"study: {key}: expected text, a number, a list or a mapping, got {value!r}"
        ) from None
