"""Configs: YAML, overrides, every message with its file, key, value and remedy; all of configs/ makes a model."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lm2_jax.common.errors import UserError
from lm2_jax.config import Config, dump_config, load_config, parse_config, replace, save_config
from lm2_jax.model import KINDS, build_model
from lm2_jax.tokenizer import check_vocabulary, load_tokenizer

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("**/*.yaml"))


def problems(text="", overrides=()):
    """The lines of the message that a config ends in."""
    with pytest.raises(UserError) as caught:
        parse_config(text, overrides, where="my.yaml")
    return str(caught.value).splitlines()


# --- YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["3e-4", "3E-4", "+3.e-4", "0.0003", "3.0e-4", "30e-5", ".3e-3"])
def test_yaml_1_2_floats(number):
    assert parse_config(f"optim: {{learning_rate: {number}}}").optim.learning_rate == pytest.approx(3e-4)


def test_a_whole_float_is_an_integer():
    steps = parse_config("train: {steps: 1e6}").train.steps
    assert steps == 1_000_000 and isinstance(steps, int)


def test_a_fraction_is_no_integer():
    assert problems("train: {steps: 1.5}") == [
        "my.yaml: train.steps: found 1.5; should be a valid integer, got a number with a fractional part"
    ]


@pytest.mark.parametrize("text", ["train: {seed: 1}\ntrain: {steps: 5}", "train:\n  seed: 1\n  seed: 2"])
def test_duplicate_keys(text):
    (line,) = problems(text)
    assert line.startswith("my.yaml: line ") and line.endswith("appears twice")


def test_merged_keys_may_be_overridden():
    stages = "train: {curriculum: [&first {segments: 1, segment_length: 8, steps: 5}, {<<: *first, segments: 2}]}"
    first, second = parse_config(stages).train.curriculum
    assert (first.segments, second.segments, second.segment_length) == (1, 2, 8)


@pytest.mark.parametrize("text", ["", "# nothing but a comment", "train:\nmodel:\n"])
def test_nothing_means_the_defaults(text):
    assert parse_config(text) == Config()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {d_model: 64", "line 1 is not valid YAML: expected ',' or '}'"),
        ("model: {}\n\ttrain: {}", "line 2 is not valid YAML"),
        ("? [a]\n: 1", "line 1 is not valid YAML: found unhashable key"),
        ("- model", "holds list; expected sections such as 'model:'"),
        ("model", "holds str; expected sections"),
        ("[" * 500, "is not valid YAML"),
        ("train: !!python/name:os.system", "line 1 is not valid YAML"),
    ],
)
def test_what_is_no_config(text, said):
    line = problems(text)[0]
    assert line.startswith("my.yaml: ") and said in line


def test_unreadable_files(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, said in [("no.yaml", "no such config file"), ("binary.yaml", "text file"), (".", "Is a directory")]:
        with pytest.raises(UserError, match=said) as caught:
            load_config(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


# --- Overrides -----------------------------------------------------------------------------------------------------


def test_overrides_reach_every_kind_of_value():
    config = parse_config(
        "train: {seed: 3, steps: 900}\ndata:",
        [
            "train.steps=1e3",
            "model.vocab_size=null",
            "eval.lengths=[1, 2]",
            "data.stories.tasks=[qa1, qa2]",
            "train.curriculum=[{segments: 1, segment_length: 8}]",
            'data.document_separator="^# "',
            "train.run_dir=runs/a=b",
            "memory={kind: none}",
            " optim . learning_rate = 5e-5",
        ],
    )
    assert (config.train.seed, config.train.steps, config.model.vocab_size) == (3, 1000, None)
    assert (config.eval.lengths, config.data.stories.tasks) == ((1, 2), ("qa1", "qa2"))
    assert config.stages[0].segment_length == 8
    assert (config.data.document_separator, config.train.run_dir) == ("^# ", "runs/a=b")
    assert (config.memory.kind, config.optim.learning_rate) == ("none", 5e-5)


def test_the_last_override_wins():
    assert parse_config("", ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_dates_are_text():
    assert parse_config("", ["train.run_dir=2025-01-31"]).train.run_dir == "2025-01-31"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "write KEY=VALUE, for example --set train.steps=100"),
        ("=3", "write KEY=VALUE"),
        ("train.=3", "write KEY=VALUE"),
        (".steps=3", "write KEY=VALUE"),
        ("train.seed.low=3", "'seed' is a value, not a section"),
        ("eval.lengths=[1", "not valid YAML"),
        ("data.path=*.txt", "quotes, --set 'data.path=\"...\"'"),
        ("data.document_separator=#", "put the value in quotes"),
        ("train.steps=many", "train.steps: found 'many'; should be a valid integer"),
        ("train.steps=", "train.steps: found None; should be a valid integer"),
        ("eval.lengths=[1, -1]", "eval.lengths.1: found -1; should be greater than or equal to 0"),
        ("mesh={data: -2}", "mesh.data: found -2; should be greater than or equal to -1"),
        ("train=5", "train: found 5; should be a section with keys"),
        ("train.run_dir=''", "train.run_dir: found ''"),
        ("tran.steps=3", "tran: unknown key; did you mean 'train'?"),
    ],
)
def test_bad_overrides_are_named_as_such(override, said):
    (line,) = problems("train: {seed: 1}", [override])
    assert line.startswith("--set ") and said in line


def test_a_mistake_of_the_file_is_not_blamed_on_an_override():
    lines = problems("train: {sed: 1, log_every: 0}", ["train.steps=-1"])
    assert lines == [
        "--set train.steps: found -1; should be greater than 0",
        "my.yaml: train.log_every: found 0; should be greater than 0",
        "my.yaml: train.sed: unknown key; did you mean 'seed'?",
    ]


# --- Messages ------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_reported_at_once():
    text = """
    modle: {}
    model: {d_model: 100, num_heads: 3, num_kv_heads: 2}
    data: {source: text, document_separator: (}
    train: {steps: 0, curriculum: [{segments: 1, segment_length: x}]}
    """
    assert problems(text, ["optim.b1=1", "seed"]) == [
        "--set 'seed': write KEY=VALUE, for example --set train.steps=100",
        "my.yaml: model.num_heads 3 does not divide d_model 100; or set head_dim",
        "my.yaml: model.num_kv_heads 2 does not divide num_heads 3",
        "my.yaml: data.path is missing; source text reads the files it names",
        "my.yaml: data.document_separator '(' is not a regular expression: missing ), unterminated subpattern at "
        "position 0",
        "--set optim.b1: found 1; should be less than 1",
        "my.yaml: train.steps: found 0; should be greater than 0",
        "my.yaml: train.curriculum.0.segment_length: found 'x'; should be a valid integer, unable to parse string as "
        "an integer",
        "my.yaml: modle: unknown key; did you mean 'model'?",
    ]


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("mdel: {}", "mdel", "model"),
        ("model: {d_modle: 64}", "model.d_modle", "d_model"),
        ("model: {rope_scaling: {factr: 8}}", "model.rope_scaling.factr", "factor"),
        ("data: {stories: {task: [qa1]}}", "data.stories.task", "tasks"),
        ("train: {curriculum: [{segments: 1, segment_length: 8, step: 3}]}", "train.curriculum.0.step", "steps"),
    ],
)
def test_unknown_keys_at_every_level(text, key, suggestion):
    assert problems(text) == [f"my.yaml: {key}: unknown key; did you mean {suggestion!r}?"]


def test_an_unknown_key_like_no_other_lists_those_known():
    assert problems("mesh: {zzz: 1}") == [
        "my.yaml: mesh.zzz: unknown key; known keys: data, fsdp, context, tensor, context_keys"
    ]


TEXT = "tokenizer: {kind: bytes}\ndata: {source: text, path: a.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {d_model: true}", "model.d_model: found True; should not be true or false"),
        ("model: {rope_theta: .inf}", "model.rope_theta: found inf; should be a finite number"),
        ("memory: {forget_bias: .nan}", "memory.forget_bias: found nan; should be a finite number"),
        ("model: {head_dim: 5}", "model.head_dim 5 is odd; RoPE rotates pairs, so it must be even"),
        ("model: {conv_width: 3}", "model.conv_width: found 3; should be 0, 4 or 8"),
        ("model: {rope_scaling: {low_freq_factor: 9}}", "model.rope_scaling.high_freq_factor 4.0 must be above"),
        ("memory: {kind: lstm}", "memory.kind: found 'lstm'; should be 'lm2'"),
        ("memory: {num_heads: 5}", "memory.num_heads 5 does not divide model.d_model 96"),
        ("memory: {width: 30}", "memory.num_heads 4 does not divide memory.width 30"),
        ("memory: {num_layers: 4}", "memory.num_layers 4 is above model.num_layers 3"),
        ("memory: {kind: rmt}\ntrain: {schedule: layer}", "train.schedule layer: rmt needs"),
        (f"memory: {{kind: rmt}}\n{TEXT}, boundaries: packed}}", "data.boundaries packed: rmt keeps one state"),
        ("data: {boundaries: packed}", "data.boundaries packed: stories start at segments; use segment"),
        ("data: {boundaries: stream}", "data.boundaries stream: stories start at segments; use segment"),
        ("data: {source: text}", "data.path is missing; source text reads the files it names"),
        ("data: {path: ['']}", "data.path.0: found ''; string should have at least 1 character"),
        ("data: {path: 3}", "data.path: found 3; should be a list, [a, b]"),
        ("data: {stories: {tasks: []}}", "data.stories.tasks: found []; list should have at least 1 item"),
        ("data: {stories: {tasks: [qa9]}}", "data.stories.tasks.0: found 'qa9'; should be 'qa1'"),
        ("data: {stories: {facts: [5, 2]}}", "data.stories.facts: 5 is above 2; write [fewest, most]"),
        ("data: {stories: {facts: [5]}}", "data.stories.facts.1: is missing"),
        ("data: {source: text, path: a.txt}", "tokenizer.kind stories knows only the generator's words; data.source"),
        ("data: {source: bin, path: a.bin}", "model.vocab_size is missing; .bin shards hold ids"),
        (f"{TEXT}}}\noptim: {{lm_loss_weight: 0}}", "optim.lm_loss_weight 0: data.source text has no answers"),
        ("tokenizer: {kind: llama3}", "tokenizer.path is missing; kind llama3 reads a file"),
        ("tokenizer: {kind: bytes, path: x}", "tokenizer.path 'x' given, but kind bytes reads no file"),
        ("optim: {accumulation_steps: 5}", "optim.accumulation_steps 5 does not divide data.batch_size 32"),
        ("optim: {warmup_steps: 5}\ntrain: {steps: 4}", "optim.warmup_steps 5 is above train.steps 4"),
        ("mesh: {data: 0}", "mesh.data 0, fsdp -1, context 1, tensor 1: each must be at least 1"),
        ("mesh: {tensor: -1}", "mesh.data 1, fsdp -1, context 1, tensor -1: each must be at least 1"),
        ("train: {seed: 4294967296}", "train.seed: found 4294967296; should be less than 4294967296"),
        ("train: {curriculum: [{segments: 1}]}", "train.curriculum.0.segment_length: is missing"),
        (
            "train: {curriculum: [{segments: 1, segment_length: 8}, {segments: 2, segment_length: 8}]}",
            "train.curriculum.0 never ends: give it steps or advance_accuracy",
        ),
    ],
)
def test_messages(text, message):
    (line,) = problems(text)
    assert line.startswith(f"my.yaml: {message}")


def test_a_mistake_leaves_allowed_neighbours_alone():
    parse_config("memory: {kind: none, num_heads: 5}")
    parse_config("model: {d_model: 100, num_heads: 3, num_kv_heads: 1, head_dim: 16}")
    parse_config(f"{TEXT}, boundaries: packed}}")
    parse_config("train: {curriculum: [{segments: 1, segment_length: 8, advance_accuracy: 1}, "
                 "{segments: 2, segment_length: 8}]}")  # fmt: skip


# --- There and back ------------------------------------------------------------------------------------------------

ODD_VALUES = [
    "train.run_dir='1e3'",
    "train.run_dir='2025-01-31'",
    "train.run_dir='null'",
    "eval.path=['007', 'off', ' x # y', 'ü: [a]']",
    "optim.eps=1e-30",
    "optim.learning_rate=0.1234567890123456789",
    "model.rope_scaling={factor: 8}",
    "train.curriculum=[{segments: 1, segment_length: 8, steps: 5}, {segments: 2, segment_length: 8}]",
]


@pytest.mark.parametrize("override", ODD_VALUES)
def test_dump_and_parse_give_an_equal_config(override):
    config = parse_config("", [override])
    again = parse_config(dump_config(config))
    assert again == config and hash(again) == hash(config) and again != Config()


def test_save_and_load(tmp_path):
    config = parse_config("train: {steps: 77}")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", ["train.seed=5"]) == replace(config, train={"seed": 5})


def test_replace():
    config = replace(Config(), memory={"kind": "none"}, train={"steps": 77})
    assert (config.memory.kind, config.train.steps) == ("none", 77)
    assert config.model == Config().model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": {"num_heads": 5}}, "config: memory.num_heads 5 does not divide model.d_model 96"),
        ({"memory": {"kinds": "none"}}, "config: memory.kinds: unknown key; did you mean 'kind'?"),
        ({"memry": {"kind": "none"}}, "config: memry: unknown key; did you mean 'memory'?"),
    ],
)
def test_replace_validates(changes, message):
    with pytest.raises(UserError) as caught:
        replace(Config(), **changes)
    assert str(caught.value).startswith(message)


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.steps = 3


# --- The files in configs/ -----------------------------------------------------------------------------------------


def _kinds_of(path):
    """The memory kinds that a config file allows."""
    for kind in KINDS:
        try:
            load_config(path, [f"memory.kind={kind}"])
        except UserError:
            continue
        yield kind


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_kind_that_a_file_names_is_one_it_allows(path):
    assert load_config(path).memory.kind in _kinds_of(path)


@pytest.mark.parametrize(
    ("path", "kind"),
    [(path, kind) for path in CONFIGS for kind in _kinds_of(path)],
    ids=lambda x: getattr(x, "stem", x),
)
def test_every_config_makes_a_model(path, kind):
    config = load_config(path, [f"memory.kind={kind}"])
    if config.tokenizer.path is None and config.data.source != "bin":
        config = check_vocabulary(config, load_tokenizer(config.tokenizer))
    assert config.model.vocab_size, f"{path}: a config whose tokenizer is a file gives model.vocab_size itself"
    T = config.data.segment_length
    model, tokens = build_model(config), jax.ShapeDtypeStruct((2, T), jnp.int32)

    def run(key, tokens):
        params = model.init(key, tokens, model.init_memory(2))["params"]
        memory = model.init_memory(2, params)
        return params, memory, *model.apply({"params": params}, tokens, memory)

    params, memory, logits, after = jax.eval_shape(run, jax.random.key(0), tokens)
    assert logits.shape == (2, T, config.model.vocab_size) and logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), memory) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert bool(jax.tree.leaves(memory)) == (kind != "none" or config.model.window is not None)
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert weights > config.model.vocab_size * config.model.d_model
