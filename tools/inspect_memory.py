"""What a trained lm2 does with its banks: how long facts survive, when slots are rewritten, where attention reads.

    python tools/inspect_memory.py --run runs/babilong_tiny --output memory.png

Contexts are held-out qa1 stories of the generator ("where is someone?") with one question, at the end.
Axes: B contexts, S segments, T tokens, D model width, N slots, M slot width, H heads, L layers with a bank.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import jax
import jax.numpy as jnp
import numpy as np

import lm2_jax
from lm2_jax.config import Config, replace
from lm2_jax.data.babi import Statement, Story
from lm2_jax.data.stories import Scatterer, is_held_out
from lm2_jax.data.worlds import generate_story
from lm2_jax.errors import UserError, run_command
from lm2_jax.evals.stories import wilson_interval
from lm2_jax.model import build_model
from lm2_jax.model.decoder import Block
from lm2_jax.model.layers import Layout, rms_norm
from lm2_jax.model.memory import write
from lm2_jax.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Contexts:
    """B contexts of S segments.

    Attributes:
      tokens_BST, target_B: what is read; the answer's id.
      asked_B: place of the token whose prediction is the answer, in its last segment.
      fact_BST: tokens of statements.
      age_B: segments between the fact that answers and the question.
    """

    tokens_BST: np.ndarray
    target_B: np.ndarray
    asked_B: np.ndarray
    fact_BST: np.ndarray
    age_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class Trace:
    """What happened while contexts were read.

    Attributes:
      right_B: whether the answer came out.
      forget_LBS: mean forget gate of a segment's write.
      written_LBST: share of the slots' attention that each token got when the bank was written.
      read_LBHN: attention to the slots from the place where the answer is predicted.
    """

    right_B: np.ndarray
    forget_LBS: np.ndarray
    written_LBST: np.ndarray
    read_LBHN: np.ndarray


def make_contexts(config: Config, tokenizer: Tokenizer, segments: int, count: int, seed: int = 0) -> Contexts:
    """Held-out qa1 stories in contexts of `segments` segments."""
    T = config.stages[-1].segment_length
    scatterer = Scatterer(tokenizer, segments * T, segment_length=T)
    columns: list[tuple[Any, ...]] = []
    rng = np.random.default_rng((seed, 1))
    while len(columns) < count:
        low, high = config.data.stories.facts
        story = generate_story("qa1", rng, int(rng.integers(low, high + 1)), 0, 1)
        if not is_held_out(story):
            continue
        document = scatterer.scatter(story, rng)
        asked = int(np.flatnonzero(document.answers)[0]) - 1
        fact, age = _facts(document.tokens, story, tokenizer, asked, T)
        shape = segments, T
        columns.append(
            (document.tokens[:-1].reshape(shape), document.tokens[asked + 1], asked % T, fact[:-1].reshape(shape), age)
        )
    return Contexts(*(np.array(column) for column in zip(*columns, strict=True)))


def statement_starts(tokens: np.ndarray, story: Story, tokenizer: Tokenizer) -> list[int]:
    """Where each statement of a story begins in its document."""
    starts, start = [], 0
    for line in story:
        if isinstance(line, Statement):
            ids = tokenizer.encode(" " + line.text)
            start = next(i for i in range(start, len(tokens)) if tokens[i : i + len(ids)].tolist() == ids)
            starts.append(start)
            start += len(ids)
    return starts


def _facts(tokens: np.ndarray, story: Story, tokenizer: Tokenizer, asked: int, T: int) -> tuple[np.ndarray, int]:
    """Which tokens belong to statements; segments between the last one about the asked person and the question."""
    person = story[-1].text.split()[-1].removesuffix("?")
    statements = [line.text for line in story if isinstance(line, Statement)]
    fact, last = np.zeros(len(tokens), bool), 0
    for text, start in zip(statements, statement_starts(tokens, story, tokenizer), strict=True):
        fact[start : start + len(tokenizer.encode(" " + text))] = True
        if text.startswith(person):
            last = start
    return fact, asked // T - last // T


def trace(config: Config, params: Any, contexts: Contexts) -> Trace:
    """Reads the contexts block by block, and looks."""
    config = replace(config, train={"remat": "none"})
    model, c = build_model(config), config.model
    block = Block(config, model.kind, with_bank=True)
    bare = Block(config, model.kind, with_bank=False)
    L = config.num_memory_layers
    B, S, T = contexts.tokens_BST.shape

    @jax.jit
    def segment(tokens_BT: jax.Array, banks_LBNM: jax.Array, asked_B: jax.Array) -> tuple[jax.Array, ...]:
        ones_B1T = jnp.ones((B, 1, T), jnp.int32)
        layout = Layout(ones_B1T, jnp.cumsum(ones_B1T, -1) - 1, jnp.zeros((B, 1), bool), packed=False)
        x_B1TD = params["embedding"][tokens_BT][:, None]
        banks, forget, written, read = [], [], [], []
        for layer in range(c.num_layers):
            if layer >= L:
                own = jax.tree.map(lambda a: a[layer - L], params["blocks"])  # noqa: B023
                (x_B1TD, _), _ = bare.apply({"params": own}, (x_B1TD, None), None, layout)
                continue
            own = jax.tree.map(lambda a: a[layer], params["bank_blocks"])  # noqa: B023
            bank_BNM = banks_LBNM[layer]
            ((x_B1TD, _), (bank, _)), seen = block.apply(
                {"params": own},
                (x_B1TD, None),
                bank_BNM,
                layout,
                capture_intermediates=_normed,
                mutable=["intermediates", "gates"],
            )
            normed_BTD = seen["intermediates"]["attention_norm"]["__call__"][0][:, 0]
            p = own["memory"]
            slots_BNM = rms_norm(bank_BNM, p["bank_norm"], c.norm_eps)
            heads = config.memory.num_heads
            read_BHTN = attention_weights(normed_BTD @ p["read_query"], slots_BNM @ p["read_key"], heads)
            written_BHNT = attention_weights(slots_BNM @ p["write_query"], normed_BTD @ p["write_key"], heads)
            banks.append(bank)
            forget.append(write(p, config.memory, c.norm_eps, normed_BTD, bank_BNM, ones_B1T[:, 0] > 0)[2].mean((1, 2)))
            written.append(written_BHNT.mean((1, 2)))
            read.append(jnp.take_along_axis(read_BHTN, asked_B[:, None, None, None], axis=2)[:, :, 0])
        hidden_BTD = rms_norm(x_B1TD[:, 0], params["final_norm"]["scale"], c.norm_eps)
        logits_BTV = model.apply({"params": params}, hidden_BTD, method="project")
        guess_B = jnp.take_along_axis(jnp.argmax(logits_BTV, -1), asked_B[:, None], axis=1)[:, 0]
        return jnp.stack(banks), guess_B, jnp.stack(forget), jnp.stack(written), jnp.stack(read)

    banks_LBNM = model.init_memory(B, params)
    forget, written = [], []
    for s in range(S):
        banks_LBNM, guess_B, forget_LB, written_LBT, read_LBHN = segment(
            contexts.tokens_BST[:, s], banks_LBNM, contexts.asked_B
        )
        forget.append(forget_LB)
        written.append(written_LBT)
    return Trace(
        right_B=np.asarray(guess_B) == contexts.target_B,
        forget_LBS=np.stack(forget, axis=-1),
        written_LBST=np.stack(written, axis=2),
        read_LBHN=np.asarray(read_LBHN),
    )


def attention_weights(q_BQD: jax.Array, k_BKD: jax.Array, num_heads: int) -> jax.Array:
    """Softmax of the scaled products, [B,H,Q,K]."""
    q_BQHD, k_BKHD = (x.reshape(*x.shape[:2], num_heads, -1) for x in (q_BQD, k_BKD))
    return jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q_BQHD, k_BKHD) / q_BQHD.shape[-1] ** 0.5, axis=-1)


def _normed(module: Any, _: str) -> bool:
    return module.name == "attention_norm"


def draw(path: Path, title: str, contexts: Contexts, seen: Trace, words: list[str]) -> None:
    """Four pictures: accuracy by the age of the fact; gates; what is written; where the answer is read.

    words: the tokens of the first context, for the labels of its pictures.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    L, _, S, _ = seen.written_LBST.shape
    figure, axes = plt.subplots(2, 2, figsize=(14, 8.5))

    # How long a fact survives
    axis = axes[0, 0]
    edges = np.unique(np.round(np.linspace(0, S, 9)).astype(int))
    for low, high in itertools.pairwise(edges):
        right_B = seen.right_B[(contexts.age_B >= low) & (contexts.age_B < high)]
        if len(right_B):
            share, (bottom, top) = right_B.mean(), wilson_interval(int(right_B.sum()), len(right_B))
            axis.plot(2 * [(low + high - 1) / 2], [bottom, top], "_-", color="tab:blue", markersize=6)
            axis.plot((low + high - 1) / 2, share, "o", color="tab:blue")
    axis.set(title="Answers right, by the age of the fact", xlabel="segments since the fact", ylim=(0, 1.03))

    # When slots are rewritten
    axis = axes[0, 1]
    facts_BS = contexts.fact_BST.any(-1)
    for layer in range(L):
        gate_BS = 1 - seen.forget_LBS[layer]
        means = [gate_BS[facts_BS].mean(), gate_BS[~facts_BS].mean()]
        axis.bar([layer - 0.2, layer + 0.2], means, width=0.38, color=["tab:orange", "tab:grey"])
    axis.bar(0, 0, color="tab:orange", label="segments with a fact")
    axis.bar(0, 0, color="tab:grey", label="background only")
    axis.set_xticks(range(L), [f"block {layer}" for layer in range(L)])
    axis.set_title("How much of a slot is given up in a segment: 1 - forget gate, mean")
    axis.legend()

    # What is written
    axis = axes[1, 0]
    share_L = [
        (seen.written_LBST[layer] * contexts.fact_BST).sum() / seen.written_LBST[layer].sum() for layer in range(L)
    ]
    axis.bar(range(L), share_L, color="tab:orange", width=0.5, label="of the write attention to tokens")
    axis.axhline(contexts.fact_BST.mean(), color="tab:grey", linestyle="--", label="of the tokens")
    axis.set_xticks(range(L), [f"block {layer}" for layer in range(L)])
    axis.set(title="Share of statements among background", ylim=(0, 1))
    axis.legend()

    # Where the answer is read
    axis = axes[1, 1]
    read_RN = seen.read_LBHN[:, 0].reshape(-1, seen.read_LBHN.shape[-1])
    image = axis.imshow(read_RN, aspect="auto", cmap="viridis", vmin=0)
    H = len(read_RN) // L
    axis.set_yticks(range(len(read_RN)), [f"{row // H}.{row % H}" for row in range(len(read_RN))], fontsize=7)
    axis.set(title=f"Read attention where '{' '.join(words)}' is answered", xlabel="slot", ylabel="block.head")
    figure.colorbar(image, ax=axis)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory or checkpoint of an lm2 on stories")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--segments", type=int, metavar="S", help="length of the contexts; default 4 windows")
    parser.add_argument("--count", type=int, default=512, metavar="B", help="contexts")
    arguments = parser.parse_args()
    model, params = lm2_jax.load(arguments.run)
    config = model.config
    if not config.num_memory_layers or config.tokenizer.kind != "stories":
        raise UserError(f"{arguments.run}: no lm2 trained on stories; banks are looked at on their questions")
    if not arguments.output.absolute().parent.is_dir():
        raise UserError(f"--output: {arguments.output.parent} is no directory")
    tokenizer = load_tokenizer(config.tokenizer)
    segments = 4 * config.stages[-1].segments if arguments.segments is None else arguments.segments
    _, most = config.data.stories.facts
    if arguments.count < 1 or segments * config.stages[-1].segment_length < 8 * (most + 1):
        raise UserError(
            f"--count {arguments.count}, --segments {segments}: at least 1 context, of {8 * (most + 1)} tokens or more "
            f"for up to {most} facts and a question"
        )
    contexts = make_contexts(config, tokenizer, segments, arguments.count)
    seen = trace(config, params, contexts)
    place = int(contexts.asked_B[0])
    question = tokenizer.decode(contexts.tokens_BST[0, -1, max(0, place - 3) : place + 1])
    title = f"{arguments.run}: {arguments.count} contexts of {segments} segments, {seen.right_B.mean():.1%} answered"
    draw(arguments.output, title, contexts, seen, question.split())
    print(f"{title}; written: {arguments.output}")


if __name__ == "__main__":
    run_command(main)
