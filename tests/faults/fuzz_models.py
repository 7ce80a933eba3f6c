"""Converted directories, weights and memory files, to be fuzzed."""

import functools
import io
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from fuzz_parser import Directory, Parser, in_file
from hostile import YAML_WORDS, altered, json_text, mutated

from lm2_jax.config import parse_config
from lm2_jax.convert import directory as converted
from lm2_jax.convert import engine, huggingface, official
from lm2_jax.convert.tensors import open_tensors, write_tensors
from lm2_jax.decoding import sampling
from lm2_jax.decoding.memory_file import load_state, save_state
from lm2_jax.model import build_model


def safetensors_bytes(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


_HEADER = {
    "__metadata__": {"format": "pt"},
    "x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "y": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
_HEADERS = (
    "F64",
    "I64",
    "BOOL",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "C64",
    [2**40, 2**40],
    [0, 2**62],
    [0, 24],
    [24, 32],
    [2**63, 0],
)


def make_safetensors(random):
    data = safetensors_bytes(altered(random, _HEADER, _HEADERS), bytes(range(32)))
    return data if random.randrange(2) else mutated(random, data, (b'"x"', b"[", b"}", b"[" * 2000))


def read_tensors(path):
    for tensor in open_tensors(path, "model").values():
        tensor.size, tensor.is_float, tensor.read()


def json_of(*others):
    return lambda random, sound: json_text(random, json.loads(sound), others)


_sections = functools.cache(yaml.safe_load)


def yaml_of(random, sound):
    values = _sections(sound)
    short = {key: values[key] for key in ("model", "memory", "tokenizer")}  # PyYAML is slow
    text = json_text(
        random, short, ("lm2", "none", "official", "tokenizer.json", "../tokenizer.json", "memory.safetensors")
    )
    return text if random.randrange(4) else mutated(random, text, YAML_WORDS)


def tensors_of(random, sound):
    size = int.from_bytes(sound[:8], "little") + 8
    header, data = json.loads(sound[8:size]), sound[size:]
    changed = safetensors_bytes(altered(random, header, _HEADERS), data)
    return changed if random.randrange(2) else mutated(random, changed)


def write_shards(directory):
    arrays = {name: np.arange(6, dtype=np.float32) for name in ("x", "y", "z")}
    write_tensors(directory, "model", arrays.items(), shard_bytes=30)


_NAMES = ("../x", "/etc/passwd", "..", "", "x/", "model-00001-of-00003.safetensors", "model.safetensors.index.json")


def tiny(kind):
    sizes = {"vocab_size": 258, "d_model": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "d_ff": 8}
    values = {
        "model": sizes,
        "memory": {"kind": kind, "num_slots": 8, "num_heads": 2},
        "data": {"segment_length": 8, "source": "text", "path": "x"},
        "tokenizer": {"kind": "bytes"},
    }
    config = parse_config(json.dumps(values))
    model = build_model(config)

    def init(key):
        return model.init(key, jnp.zeros((1, 8), jnp.int32), model.init_memory(1))["params"]

    return config, model, jax.jit(init)(jax.random.key(0))


def in_order(items, title):
    return items


def write_directory(kind, write):
    def make(directory):
        known = {}

        def remembered(config):  # tracing would take all the time
            key = config.model, config.memory, config.data.segment_length
            if key not in known:
                known[key] = engine.abstract_params(config)
            return known[key]

        for module in (converted, huggingface, official):
            module.abstract_params = remembered
        config, _, params = tiny(kind)
        write(engine.Checkpoint(config, engine.from_arrays(params, directory)), directory)

    return make


class Memory(Directory):
    """A memory file and the model that it is of."""

    def __init__(self):
        super().__init__(self._save, self._load, {"memory": self._change})

    def _save(self, directory):
        _, self._model, self._params = tiny("lm2")
        state = sampling.start(self._model, self._params, 2)
        _, state = sampling.read(self._model, self._params, [[1, 2, 3], [4]], state)
        save_state(directory / "memory", self._model, self._params, state)

    def _load(self, directory):
        load_state(directory / "memory", self._model, self._params)

    def _change(self, random, sound):
        if random.randrange(2):
            return tensors_of(random, sound)
        size = int.from_bytes(sound[:8], "little") + 8
        header = json.loads(sound[8:size])
        owner = json_text(random, json.loads(header["__metadata__"]["lm2_jax.memory"]))
        header["__metadata__"]["lm2_jax.memory"] = owner.decode(errors="replace")
        return safetensors_bytes(header, sound[size:])


class Torch:
    """PyTorch files."""

    def prepare(self, directory):
        import torch

        made = io.BytesIO()
        torch.save({"model_state_dict": {"x": torch.ones(2, 3), "y": torch.ones(1, dtype=torch.bfloat16)}}, made)
        self._sound = made.getvalue()
        (directory / "x.pth").write_bytes(self._sound)
        read_tensors(directory / "x.pth")

    def make(self, random):
        with zipfile.ZipFile(io.BytesIO(self._sound)) as parts:
            files = {name: parts.read(name) for name in parts.namelist()}
        if random.randrange(4) == 0:
            return mutated(random, self._sound)
        name = random.choice(list(files))
        files[name] = mutated(
            random, files[name], (b"cos\nsystem\n", b"R", b".", b"\x8a\x05\xff\xff\xff\xff\x7f", b"K\xff", b"t")
        )
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as parts:
            for name, data in files.items():
                parts.writestr(name, data)
        return made.getvalue()


_TORCH = Torch()


PARSERS = {
    "safetensors": Parser(make_safetensors, in_file("x.safetensors", read_tensors)),
    "shards": Directory(write_shards, read_tensors, {"model.safetensors.index.json": json_of(*_NAMES)}).parser(),
    "torch": Parser(_TORCH.make, in_file("x.pth", read_tensors), _TORCH.prepare),
    "llama": Directory(
        write_directory("none", lambda checkpoint, path: huggingface.write(checkpoint, path, "float32", in_order)),
        lambda path: huggingface.read(path, (), in_order),
        {"config.json": json_of("llama", "llama3"), "model.safetensors": tensors_of},
    ).parser(),
    "lm2": Directory(
        write_directory("lm2", lambda checkpoint, path: huggingface.write(checkpoint, path, "float32", in_order)),
        lambda path: huggingface.read(path, (), in_order),
        {"config.json": json_of("lm2", "rmt", "none", 8, 2**31 - 1), "model.safetensors": tensors_of},
    ).parser(),
    "official": Directory(
        write_directory("official", lambda checkpoint, path: official.write(checkpoint, path, "float32", in_order)),
        lambda path: official.read(path, (), in_order),
        {"config.json": json_of(8, 2**31 - 1), "state_dict.safetensors": tensors_of},
    ).parser(),
    "converted": Directory(
        write_directory("lm2", lambda checkpoint, path: converted.write(checkpoint, path, in_order)),
        lambda path: converted.read(path, in_order),
        {"config.yaml": yaml_of, "params.safetensors": tensors_of},
    ).parser(),
    "memory": Memory().parser(),
}
