"""A model with the interface of lm-evaluation-harness: texts in; log-likelihoods and texts out.

Answers are kept by the content of their request, so an interrupted evaluation resumes, and repeated requests are not
computed again. This module imports lm_eval, which is optional: import it only where it is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from lm2_jax.common.errors import UserError
from lm2_jax.common.progress import Progress
from lm2_jax.evals import generation, scoring
from lm2_jax.evals.model import EvalModel
from lm2_jax.evals.results import ResultLog
from lm2_jax.tokenizer import encode_long, prompt_ids
from lm2_jax.tokenizer.chat import chat_ids, render_chat

_NEW_TOKENS = 256  # for tasks that do not say; the default of the harness's own models
_REPORT_SECONDS = 5.0

# Indices of requests, and their answers
Answers = Iterator[list[tuple[int, Any]]]


class HarnessModel(TemplateLM):
    """A loaded model. Every request starts from a fresh memory, and with the begin token if there is one.

    Args:
      results: keeps the answers, by the key ("request",).
      log: receives progress lines.
      chat: True if requests are rendered chats, in which names of control tokens are those tokens.
    """

    def __init__(self, loaded: EvalModel, results: ResultLog, log: Callable[[str], None], chat: bool = False) -> None:
        super().__init__()
        self._loaded, self._results, self._log, self._chat = loaded, results, log, chat

    @property
    def eot_token_id(self) -> int | None:
        """The end token, or None if there is none."""
        return self._loaded.tokenizer.special.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the begin token, or else the end token.

        Raises UserError if there is neither.
        """
        special = self._loaded.tokenizer.special
        for token in (special.bos_id, special.eos_id):
            if token is not None:
                return token
        raise UserError(
            "a request has no context, and the tokenizer has neither a begin nor an end token to put before it; such "
            "tasks need another tokenizer"
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; add_special_tokens False leaves out what begins every text."""
        tokenizer = self._loaded.tokenizer
        if self._chat:  # whose template may write what begins a text
            ids, prefix = chat_ids(tokenizer, string).tolist(), list(tokenizer.special.prefix_ids)
            return ids if add_special_tokens is False or ids[: len(prefix)] == prefix else [*prefix, *ids]
        encode = encode_long if add_special_tokens is False else prompt_ids
        return encode(tokenizer, string).tolist()

    @property
    def tokenizer_name(self) -> str:
        """A name that changes with the tokenizer and its chat template."""
        return f"{self._loaded.tokenizer.fingerprint()} {self.chat_template()}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's chat template, empty if it has none; lm_eval keeps it with its results."""
        origin = self._loaded.origin
        return (origin.chat_template if origin else None) or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat by the model's template; without a system message, if the template refuses it."""
        spoken = [message for message in chat_history if message["role"] != "system"]
        try:
            return render_chat(self._loaded.origin, chat_history, add_generation_prompt)
        except UserError:
            if len(spoken) == len(chat_history):
                raise
        return render_chat(self._loaded.origin, spoken, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Implements `LM.loglikelihood`; contexts and continuations may be of any length."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for (_, text), context, continuation in requests:
            if not continuation:
                raise UserError(f"the continuation {text!r} has no token of its own in the tokenizer's encoding")
            pairs.append((context or [self.prefix_token_id], continuation))

        def scored(left: Sequence[int]) -> Answers:
            for batch in scoring.loglikelihood(self._loaded, [pairs[index] for index in left]):
                yield [(left[number], [log, greedy]) for number, log, greedy in batch]

        answers = self._answers("loglikelihood", [texts for texts, _, _ in requests], scored)
        return [(log, greedy) for log, greedy in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Implements `LM.loglikelihood_rolling`; memory spans the whole text, which is not cut into windows."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]

        def scored(left: Sequence[int]) -> Answers:
            if empty := [(index, 0.0) for index in left if not texts[index]]:
                yield empty
            indices = [index for index in left if texts[index]]
            pairs = [([self.prefix_token_id], texts[index]) for index in indices]
            for batch in scoring.loglikelihood(self._loaded, pairs):
                yield [(indices[number], log) for number, log, _ in batch]

        return self._answers("loglikelihood_rolling", [request.args for request in requests], scored)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Implements `LM.generate_until`. Raises UserError if a task asks for beam search."""
        keys = _keys("generate_until", [request.args for request in requests])
        rows = self._loaded.config.data.batch_size

        def generated(left: Sequence[int]) -> Answers:
            by_options = defaultdict(list)
            for index in left:
                prompt = self.tok_encode(requests[index].args[0]) or [self.prefix_token_id]
                by_options[json.dumps(requests[index].args[1], sort_keys=True)].append((index, prompt))
            for options, prompts in by_options.items():
                stops, new_tokens, sampling = _options(json.loads(options))
                prompts.sort(key=lambda item: -len(item[1]))
                for start in range(0, len(prompts), rows):
                    indices, ids = zip(*prompts[start : start + rows], strict=True)
                    seeds = [int(keys[index][:8], 16) for index in indices]
                    texts = generation.generate_until(self._loaded, ids, rows, new_tokens, stops, seeds, **sampling)
                    yield list(zip(indices, texts, strict=True))

        return self._answers("generate_until", [request.args for request in requests], generated)

    def _answers(self, kind: str, requests: Sequence[tuple], compute: Callable[[Sequence[int]], Answers]) -> list[Any]:
        """The answers to all requests: those that are kept, and those that `compute` gives for the rest."""
        keys = _keys(kind, requests)
        left = [index for index, key in enumerate(keys) if (key,) not in self._results]
        progress, done = Progress(self._log, len(left), _REPORT_SECONDS), 0
        for batch in compute(left) if left else ():
            self._results.add({"request": keys[index], "answer": answer} for index, answer in batch)
            done += len(batch)
            progress.report(done, f"{kind}: {len(keys) - len(left) + done}/{len(keys)} answered")
        return [self._results[key,]["answer"] for key in keys]


def _keys(kind: str, requests: Iterable[tuple]) -> list[str]:
    """Keys of requests: hashes of the content and its count so far, as sampled answers to one question differ."""
    texts = [json.dumps([kind, *arguments], sort_keys=True) for arguments in requests]
    seen: Counter[str] = Counter()
    keys = []
    for text in texts:
        keys.append(hashlib.sha256(f"{seen[text]} {text}".encode()).hexdigest()[:32])
        seen[text] += 1
    return keys


def _options(generation_kwargs: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """A task's options of generation: stop strings, the most new tokens, and options of sampling."""
    options = normalize_gen_kwargs(generation_kwargs, _NEW_TOKENS)
    if options.get("num_beams", 1) != 1:
        raise UserError(f"a task asks for num_beams {options['num_beams']}; beam search is not supported")
    sampling = {name: options[name] for name in ("top_k", "top_p") if options.get(name)}
    sampling["temperature"] = float(options.get("temperature", 1.0)) if options["do_sample"] else 0.0
    return [stop for stop in options["until"] if stop], options["max_gen_toks"], sampling
