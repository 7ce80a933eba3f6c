"""The model card (README.md) of an exported Hugging Face directory: licence, origin, what it is, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lm2_jax.common.untrusted import resolve_inside
from lm2_jax.convert.engine import Checkpoint
from lm2_jax.convert.llama_config import LLAMAS
from lm2_jax.tokenizer import CARD, Origin

_LONGEST_HEAD = 1 << 16  # bytes of another card that are read for its front matter
_LICENCE_KEYS = ("license", "license_name", "license_link")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def write_card(checkpoint: Checkpoint, directory: Path, model_type: str) -> None:
    """Writes README.md. A licence is stated only where the card of the weights it came from states one.

    model_type: of the directory's config.json; llama and mistral need no code of ours.
    """
    _write(checkpoint.origin, directory, "transformers", _body(checkpoint, model_type))


def write_adapter_card(checkpoint: Checkpoint, directory: Path, base: str | None, with_code: bool) -> None:
    """Writes README.md of an adapter.

    checkpoint: what the adapter holds. base: the model it was trained on. with_code: it is loaded by our modelling
    code, and not by PEFT.
    """
    count = sum(tensor.size for tensor in checkpoint.params.values())
    facts = [f"{count:,} parameters", f"trained on top of: {base or 'a Llama that is not named'}"]
    facts += _window(checkpoint) + _training(checkpoint)
    title = "# LM2 adapter" if with_code else "# LoRA adapter"
    what = "The trained part of a model, exported from lm2_jax. It goes onto the base, whose weights are not in here."
    needs = "`transformers>=5.4`, and trust in the modelling code in this directory" if with_code else "`peft`"
    loading = _ADAPTER if with_code else _PEFT_ADAPTER
    body = [title, "", what, "", *(f"- {fact}" for fact in facts), "", f"Needs {needs}:", "", *loading]
    _write(checkpoint.origin, directory, "transformers" if with_code else "peft", body)


_ADAPTER = (
    "```python",
    "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
    "",
    'path = "path/to/this/directory"',
    'LM2ForCausalLM = get_class_from_dynamic_module("modeling_lm2.LM2ForCausalLM", path)',
    'model = LM2ForCausalLM.from_adapter(path, "path/or/name/of/the/base")',
    "```",
)
_PEFT_ADAPTER = (
    "```python",
    "from peft import PeftModel",
    "from transformers import AutoModelForCausalLM",
    "",
    'base = AutoModelForCausalLM.from_pretrained("path/or/name/of/the/base")',
    'model = PeftModel.from_pretrained(base, "path/to/this/directory")',
    "```",
)


def hub_name(origin: Origin | None) -> str | None:
    """The hub's name of the weights, if their config.json tells it."""
    return _hub_id(origin.json("config.json").get("_name_or_path")) if origin else None


def _hub_id(name: Any) -> str | None:
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) else None


def _write(origin: Origin | None, directory: Path, library: str, body: Sequence[str]) -> None:
    theirs = {} if origin is None else _front_matter(origin)
    licence = {key: theirs[key] for key in _LICENCE_KEYS if isinstance(theirs.get(key), str)}
    base = hub_name(origin) or _hub_id(theirs.get("base_model"))  # or else what they were made from
    front = {"library_name": library, **licence, "pipeline_tag": "text-generation", "tags": ["lm2"]}
    if base is not None:
        front["base_model"] = base
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", *body]
    lines += ["", "## Licence", "", _licence(licence, base), ""]
    (directory / CARD).write_text("\n".join(lines), encoding="utf-8")


def _body(checkpoint: Checkpoint, model_type: str) -> list[str]:
    config, memory, with_code = checkpoint.config, checkpoint.config.memory, model_type not in LLAMAS
    count = sum(tensor.size for tensor in checkpoint.params.values())
    has_memory = any("memory" in path for path in checkpoint.params)
    slots = f", {memory.num_slots:,} slots" if has_memory else ""
    facts = [f"{count:,} parameters", f"segments of {config.trained_segment_length:,} tokens"]
    facts += [f"memory: {memory.kind}{slots}", *_window(checkpoint), *_training(checkpoint)]
    if with_code:
        what = f"A Llama that reads text in segments{', linked by a memory' if has_memory else ''}"
        needs = "`transformers>=5.4`, and `trust_remote_code=True` for the modelling code in this directory"
    else:
        what, needs = f"A plain {model_type.capitalize()}", "`transformers>=4.43`"
    return [
        "# LM2" if with_code else f"# {model_type.capitalize()}",
        "",
        f"{what}, exported from lm2_jax.",
        "",
        *(f"- {fact}" for fact in facts),
        "",
        f"Needs {needs}:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        'path = "path/to/this/directory"',
        f"model = AutoModelForCausalLM.from_pretrained(path{', trust_remote_code=True' if with_code else ''})",
        "```",
    ]


def _window(checkpoint: Checkpoint) -> list[str]:
    """The fact of what attention sees beyond its segment; none without a window."""
    c = checkpoint.config.model
    if c.window is None:
        return []
    sees = f"attention: a document's last {c.window:,} tokens"
    if not c.sinks:
        return [sees]
    cut = "" if c.max_distance is None else f", these no farther than {c.max_distance:,} positions"
    return [f"{sees} and its first {c.sinks:,}{cut}"]


def _training(checkpoint: Checkpoint) -> list[str]:
    """The fact of how long it was trained; none where that is not known."""
    if checkpoint.trained is None:
        return []
    return ["trained for {step:,} steps on {tokens:,} tokens".format(**checkpoint.trained)]


def _licence(licence: Mapping[str, str], base: str | None) -> str:
    if licence:
        stated = licence.get("license_name", licence.get("license", ""))
        where = f" ({base})" if base else ""
        return f"`{stated}`, as stated by the card of the weights that this model was made from{where}."
    return (
        "**No licence is stated.** The licences of the weights and of the data that this model was made from apply; "
        "find them out, and name them here, before you pass it on."
    )


def _front_matter(origin: Origin) -> dict[str, Any]:
    """The YAML at the beginning of the card that came with the weights; empty if there is none that can be read."""
    if not origin.has(CARD):
        return {}
    with resolve_inside(origin.directory, CARD).open("rb") as file:
        head = file.read(_LONGEST_HEAD).decode(errors="replace")
    found = re.match(r"---\r?\n(.*?)\r?\n---\s", head, re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except Exception:  # whatever PyYAML raises for another program's file
        return {}
    return values if isinstance(values, dict) else {}
