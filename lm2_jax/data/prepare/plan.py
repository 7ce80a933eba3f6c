"""Preparing a directory from start to end: the plan, the work that is left of it, and at last the manifest."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import lock_directory, write_atomically
from lm2_jax.common.storage import AnyPath, to_path
from lm2_jax.common.trees import copy_file, move_file, remove_tree
from lm2_jax.common.untrusted import short_repr
from lm2_jax.data.prepare.chunks import Input
from lm2_jax.data.prepare.shards import PROBLEMS_KEPT, MakeShards, Report, Settings, group_inputs, raise_first
from lm2_jax.data.prepared import (
    MANIFEST,
    Manifest,
    TokenizerRecord,
    data_file,
    index_path,
    make_manifest,
    read_manifest,
)
from lm2_jax.tokenizer import Tokenizer, origin_beside

_PLAN = "plan.json"
_DIFFERENCES_SHOWN = 5
_AT_A_GLANCE = ("name", "bytes", "split", "revision")  # of an input, without its checksum
_LATER_KEYS = ("content",)  # of an input, which plans of earlier versions lack


def prepare(inputs: Sequence[Input], settings: Settings, runner: MakeShards) -> Manifest:
    """Creates, resumes or verifies the data set in `settings.output`.

    Raises UserError for a tokenizer that cannot be read, an output that holds something else, no document at all, and,
    with `on_error` stop, for the first problem with an input. Raises Unreachable if an input cannot be read now; the
    preparation can then be resumed.
    """
    tokenizer = settings.load_tokenizer()
    if settings.format == "bin" and not tokenizer.special.prefix_ids:
        raise UserError("--tokenizer: begins its texts with no token; documents of .bin shards begin with one")
    output, progress_dir = settings.output, settings.progress_dir
    plan = {
        "tokenizer": tokenizer.fingerprint(),
        **settings.options(),
        "inputs": [source.state() for source in inputs],
    }
    if (output / MANIFEST).exists():
        manifest = _finished(plan, inputs, settings)
        remove_tree(progress_dir)  # left by a run killed after its manifest
        return manifest
    try:
        progress_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be made ({error.strerror})") from None
    with lock_directory(progress_dir, f"{output}: another process is preparing it; wait, or give another --output"):
        _keep_plan(plan, settings)
        done = _reports(progress_dir)
        raise_first(_problems(done), settings)
        runner(group_inputs(inputs, settings.shard_bytes), settings, done, tokenizer.vocab_size)
        reports = _reports(progress_dir)
        raise_first(_problems(reports), settings)
        manifest = _finish(reports, settings, tokenizer)
    remove_tree(progress_dir)
    return manifest


def _keep_plan(plan: dict[str, Any], settings: Settings) -> None:
    """Writes the plan: settings that must match before an interrupted preparation may be resumed.

    Raises UserError if the unfinished work has another plan.
    """
    path = settings.progress_dir / _PLAN
    if not path.exists():
        others = [child.name for child in settings.output.iterdir() if child != settings.progress_dir]
        if others:
            raise UserError(
                f"--output: {settings.output} holds other files ({', '.join(sorted(others)[:3])}); give a new directory"
            )
        write_atomically(path, json.dumps(plan, indent=1) + "\n")
    elif differences := _differences(json.loads(path.read_text()), plan):
        raise UserError(
            f"--output: {settings.output} holds unfinished work of another preparation; give another --output, remove "
            "it, or undo:\n" + "\n".join(differences)
        )


def _finished(plan: dict[str, Any], inputs: Sequence[Input], settings: Settings) -> Manifest:
    """Reads the finished manifest. Raises UserError if it is that of another preparation, or of other contents."""
    manifest = read_manifest(settings.output, "--output")
    made = {"tokenizer": manifest.tokenizer.fingerprint, **manifest.settings, "inputs": manifest.sources}
    before, now = (
        made | {"inputs": [{key: source.get(key) for key in _AT_A_GLANCE} for source in made["inputs"]]}
        for made in (made, plan)
    )
    differences = _differences(before, now)
    if not differences:  # reads every byte of the inputs
        differences = _differences(made, plan | {"inputs": [source.identity() for source in inputs]})
    if differences:
        raise UserError(
            f"--output: {settings.output} holds another preparation; give another --output, or remove it:\n"
            + "\n".join(differences)
        )
    return manifest


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists the differences, a line each; inputs one by one."""
    found = _changes(before | {"inputs": None}, now | {"inputs": None})
    inputs = list(itertools.zip_longest(before["inputs"], now["inputs"], fillvalue={}))
    changed = [(there, here) for there, here in inputs if _changes(there, here)]
    for there, here in changed[:_DIFFERENCES_SHOWN]:
        found.append(f"input {here.get('name', there.get('name'))}: {', '.join(_changes(there, here))}")
        if here.get("name") == there.get("name") and here.get("revision") != there.get("revision"):
            found[-1] += "; owner/name@revision names one of them"
    if len(changed) > _DIFFERENCES_SHOWN:
        found.append(f"and {len(changed) - _DIFFERENCES_SHOWN} inputs more")
    return [f"  {line}" for line in found]


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    known = [key for key in before | now if key in before or key not in _LATER_KEYS]
    pairs = [(key, before.get(key), now.get(key)) for key in known]
    return [f"{key}: {short_repr(there)} there, {short_repr(here)} now" for key, there, here in pairs if there != here]


def _reports(progress_dir: AnyPath) -> dict[str, Report]:
    """Reads the reports of all whole shards, by name, in order."""
    paths = sorted(path for path in progress_dir.glob("*.json") if path.name != _PLAN)
    return {path.stem: Report.model_validate_json(path.read_bytes()) for path in paths}


def _problems(reports: dict[str, Report]) -> list[str]:
    return [problem for report in reports.values() for problem in report.problems]


def _finish(reports: dict[str, Report], settings: Settings, tokenizer: Tokenizer) -> Manifest:
    """Gives shards their final names, copies the tokenizer, and writes the manifest last."""
    shards = [report.shard for report in reports.values() if report.shard.documents]
    problems = _problems(reports)
    if not shards:
        raise UserError("\n".join(["--input: no document is left", *problems[:5]]))
    if settings.format == "bin":  # the official trainer goes by files' names: the first is for validation
        names = [f"corpus_{'train' if number else 'val'}_{number:06d}" for number in range(len(shards))]
        for shard, name in zip(shards, names, strict=True):
            for at in (functools.partial(data_file, format="bin"), index_path):
                if (before := at(settings.output, shard.name)).exists():
                    move_file(before, at(settings.output, name))
        shards = [shard.model_copy(update={"name": name}) for shard, name in zip(shards, names, strict=True)]
    text = make_manifest(
        format=settings.format,
        tokenizer=_keep_tokenizer(settings, tokenizer),
        empty=sum(report.empty for report in reports.values()),
        skipped=sum(report.skipped for report in reports.values()),
        problems=tuple(problems[:PROBLEMS_KEPT]),
        settings=settings.options(),
        sources=tuple(source for report in reports.values() for source in report.sources),
        shards=tuple(shards),
    )
    write_atomically(settings.output / MANIFEST, text)
    return read_manifest(settings.output, "--output")


def _keep_tokenizer(settings: Settings, tokenizer: Tokenizer) -> TokenizerRecord:
    kind, path = settings.tokenizer.kind, settings.tokenizer.path
    file = None
    if path is not None:
        file = "tokenizer.json" if kind == "tokenizers" else "tokenizer.model"
        copy_file(to_path(path), settings.output / file)
        if (origin := origin_beside(path)) is not None:
            origin.copy_to(settings.output)
    return TokenizerRecord(kind=kind, file=file, fingerprint=tokenizer.fingerprint(), vocab_size=tokenizer.vocab_size)
