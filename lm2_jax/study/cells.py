"""The cells of a study: one run each, with its config and its place in the plan."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.config import Config, load_config, replace
from lm2_jax.study.presets import Changes, Preset
from lm2_jax.study.results import Result, best_setting
from lm2_jax.tokenizer import check_vocabulary, load_tokenizer

OPTIONS = ("babi", "background", "tokenizer", "start")  # in the config of a cell `{babi}` stands for what --babi names
Files = Mapping[str, Path]  # those that were given, by option


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      labels: its position in the study: phase, model, seed, and the setting selected for it.
      config: complete, but for its run directory.
      unit: tokens that the lengths of contexts are multiples of.
    """

    labels: Mapping[str, Any]
    config: Config
    unit: int

    @property
    def name(self) -> str:
        """Stem of its files' names."""
        return "-".join(re.sub(r"[^\w.]+", "_", str(value)) for value in self.labels.values())


class Plan:
    """The cells of a preset."""

    def __init__(self, preset: Preset, files: Files) -> None:
        """files: the comparison asks about `babi`, and its cells start from the weights in `start`."""
        self._preset, self._files = preset, files
        config = _changed(load_config(preset.config), preset.base)
        self._config = check_vocabulary(config, load_tokenizer(with_files(config, files).tokenizer))

    def ablations(self) -> Iterator[Cell]:
        """lm2 and its variants."""
        for seed in self._preset.ablation_seeds:
            for name, changes in self._preset.ablations.items():
                yield self._cell(
                    {"phase": "ablation", "model": name, "seed": seed}, self._preset.ablation_base, changes
                )

    def grid(self) -> Iterator[Cell]:
        """Every model in every setting, with the first seed."""
        for setting in self._preset.settings:
            for model in self._preset.models:
                if not ("data" in self._preset.models[model] and "data" in self._preset.settings[setting]):
                    yield self._compared(model, setting, self._preset.seeds[0])

    def comparison(self, grid: Sequence[Result]) -> Iterator[Cell]:
        """The other seeds of every model, in the first setting and in the one that was best of those in the grid."""
        first = next(iter(self._preset.settings))
        for seed in self._preset.seeds[1:]:
            for model in self._preset.models:
                for setting in dict.fromkeys((first, self._best(model, grid))):
                    yield self._compared(model, setting, seed)

    def longer(self, grid: Sequence[Result]) -> Iterator[Cell]:
        """Models in their best setting, every stage and the whole of twice as many steps."""
        for model, seeds in self._preset.longer.items():
            for seed in self._preset.seeds[:seeds]:
                cell = self._compared(model, self._best(model, grid), seed)
                train = cell.config.model_dump()["train"]
                for stage in train["curriculum"]:
                    stage["steps"] = stage["steps"] and 2 * stage["steps"]
                config = replace(cell.config, train={"steps": 2 * train["steps"], "curriculum": train["curriculum"]})
                yield dataclasses.replace(cell, labels={**cell.labels, "phase": "longer"}, config=config)

    def _best(self, model: str, grid: Sequence[Result]) -> str:
        """The model's best setting, or the first while the grid has none of its results."""
        own = [result for result in grid if result["labels"]["model"] == model]
        return best_setting(own) if own else next(iter(self._preset.settings))

    def _compared(self, model: str, setting: str, seed: int) -> Cell:
        labels = {"phase": "comparison", "model": model, "setting": setting, "seed": seed}
        cell = self._cell(labels, {}, self._preset.settings[setting], self._preset.models[model])
        config = with_questions(cell.config, self._files.get("babi"))
        if "start" in self._files:
            config = replace(config, train={"init_from": f"{{start}}/{config.memory.kind}"})
        return dataclasses.replace(cell, config=config)

    def _cell(self, labels: Mapping[str, Any], base: Changes, *changes: Changes) -> Cell:
        from lm2_jax.model.sizes import parameters, with_parameters  # imported late so that --help stays fast

        standard = _changed(self._config, base)
        config = _changed(self._config, base, *changes, {"train": {"seed": labels["seed"]}})
        config = with_parameters(config, parameters(standard), self._preset.d_ff_multiple)
        window = standard.stages[-1]
        return Cell(labels, config, window.segments * window.segment_length)


def _changed(config: Config, *changes: Changes) -> Config:
    merged: dict[str, dict[str, Any]] = {}
    for change in changes:
        for section, keys in change.items():
            merged.setdefault(section, {}).update(keys)
    return replace(config, **merged)


# --- Files that cells read -----------------------------------------------------------------------------------------


def with_questions(config: Config, babi: Path | None) -> Config:
    """The config, asking about bAbI's own stories of its tasks besides the generator's.

    Nobody trains on them: a qa2 of 2,000 stories is learnt by heart. So a task's training file is asked about where
    there is no qa1_..._test.txt of it. Files are named from `{babi}` on; `with_files` says where that is.
    """
    files: list[Path] = []
    for task in config.data.stories.tasks if babi else ():
        files += sorted(babi.glob(f"{task}_*_test.txt")) or sorted(babi.glob(f"{task}_*.txt"))
    return replace(config, eval={"path": [f"{{babi}}/{file.name}" for file in files] or None})


def with_files(config: Config, files: Files) -> Config:
    """The config of a cell with the paths of its files. Raises UserError if one is not given."""

    def resolve(path: str) -> str:
        for name in OPTIONS:
            if (mark := f"{{{name}}}") in path:
                if name not in files:
                    raise UserError(f"--{name} is missing; the cells of this preset read it")
                path = path.replace(mark, str(files[name]))
        return path

    return replace(
        config,
        eval={"path": config.eval.path and [resolve(path) for path in config.eval.path]},
        data={"background": config.data.background and [resolve(path) for path in config.data.background]},
        tokenizer={"path": config.tokenizer.path and resolve(config.tokenizer.path)},
        train={"init_from": config.train.init_from and resolve(config.train.init_from)},
    )
