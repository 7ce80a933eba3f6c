"""A model as lm-evaluation-harness wants it: texts in; log-likelihoods and texts out.

What was answered is kept by the request's content, so an interrupted evaluation goes on, and another one that asks the
same takes it from there. This module imports lm_eval, which is optional: import it where it is needed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from lm2_jax.common.errors import UserError
from lm2_jax.common.progress import clock
from lm2_jax.evals.generation import answer
from lm2_jax.evals.model import EvalModel
from lm2_jax.evals.results import ResultLog
from lm2_jax.evals.scoring import score
from lm2_jax.tokenizer import encode_long

_NEW_TOKENS = 256  # where a task does not say; as the harness's own models have it
_SAY_SECONDS = 5.0

# Positions of requests among those that are left, and their answers
Answers = Iterator[list[tuple[int, Any]]]


class HarnessModel(TemplateLM):
    """A loaded model. Every request finds a fresh memory, and begins with the begin token where there is one.

    Args:
      finished: keeps what is answered, by the key ("request",).
      say: is told what is going on.
    """

    def __init__(self, loaded: EvalModel, finished: ResultLog, log: Callable[[str], None]) -> None:
        super().__init__()
        self._loaded, self._finished, self._say = loaded, finished, log

    @property
    def eot_token_id(self) -> int | None:
        """The end token; None where there is none."""
        return self._loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the begin token, or else the end token.

        Raises UserError where there is neither.
        """
        for token in (self._loaded.tokenizer.bos_id, self._loaded.tokenizer.eos_id):
            if token is not None:
                return token
        raise UserError(
            "a request has no context, and the tokenizer neither a begin nor an end token to put before it; such tasks "
            "need another tokenizer"
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; after the begin token unless add_special_tokens is False."""
        begin = self._loaded.tokenizer.bos_id if add_special_tokens is not False else None
        return [*([] if begin is None else [begin]), *encode_long(self._loaded.tokenizer, string).tolist()]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As `LM.loglikelihood`; contexts and continuations of any length."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for (_, text), context, continuation in requests:
            if not continuation:
                raise UserError(f"the tokenizer makes no token of its own of the continuation {text!r}")
            pairs.append((context or [self.prefix_token_id], continuation))

        def scored(left: Sequence[int]) -> Answers:
            for batch in score(self._loaded, [pairs[index] for index in left]):
                yield [(place, [log, greedy]) for place, log, greedy in batch]

        answers = self._answer("loglikelihood", [texts for texts, _, _ in requests], scored)
        return [(log, greedy) for log, greedy in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """As `LM.loglikelihood_rolling`; memory runs through the whole text, and nothing is cut into windows."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]

        def scored(left: Sequence[int]) -> Answers:
            if empty := [(place, 0.0) for place, index in enumerate(left) if not texts[index]]:
                yield empty
            places = [place for place, index in enumerate(left) if texts[index]]
            for batch in score(self._loaded, [([self.prefix_token_id], texts[left[place]]) for place in places]):
                yield [(places[number], log) for number, log, _ in batch]

        return self._answer("loglikelihood_rolling", [request.args for request in requests], scored)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """As `LM.generate_until`. Raises UserError for beams."""
        keys = _keys("generate_until", [request.args for request in requests])
        rows = self._loaded.config.data.batch_size

        def written(left: Sequence[int]) -> Answers:
            alike = defaultdict(list)  # by their options
            for place, index in enumerate(left):
                prompt = self.tok_encode(requests[index].args[0]) or [self.prefix_token_id]
                alike[json.dumps(requests[index].args[1], sort_keys=True)].append((place, prompt))
            for options, prompts in alike.items():
                stops, new_tokens, drawing = _options(json.loads(options))
                prompts.sort(key=lambda item: -len(item[1]))
                for start in range(0, len(prompts), rows):
                    places, ids = zip(*prompts[start : start + rows], strict=True)
                    seeds = [int(keys[left[place]][:8], 16) for place in places]
                    texts = answer(self._loaded, ids, rows, new_tokens, stops, seeds, **drawing)
                    yield list(zip(places, texts, strict=True))

        return self._answer("generate_until", [request.args for request in requests], written)

    def _answer(self, kind: str, requests: Sequence[tuple], answers: Callable[[Sequence[int]], Answers]) -> list[Any]:
        """The answers to all requests: those that are kept, and those that `answers` gives for the indices left."""
        keys = _keys(kind, requests)
        left = [index for index, key in enumerate(keys) if (key,) not in self._finished]
        begun = said = time.monotonic()
        done = 0
        for batch in answers(left) if left else ():
            self._finished.add({"request": keys[left[place]], "answer": found} for place, found in batch)
            done += len(batch)
            if (now := time.monotonic()) - said > _SAY_SECONDS or done == len(left):
                said, rest = now, (now - begun) / done * (len(left) - done)
                self._say(f"{kind}: {len(keys) - len(left) + done}/{len(keys)} answered, {clock(rest)} left")
        return [self._finished[key,]["answer"] for key in keys]


def _keys(kind: str, requests: Iterable[tuple]) -> list[str]:
    """A name for each request, of its content and of how often it came before: drawn answers to one question differ."""
    texts = [json.dumps([kind, *arguments], sort_keys=True) for arguments in requests]
    before: Counter[str] = Counter()
    keys = []
    for text in texts:
        keys.append(hashlib.sha256(f"{before[text]} {text}".encode()).hexdigest()[:32])
        before[text] += 1
    return keys


def _options(asked: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """What a task asks of generation: stop strings, the most new tokens, and how to draw them."""
    options = normalize_gen_kwargs(asked, _NEW_TOKENS)
    if options.get("num_beams", 1) != 1:
        raise UserError(f"a task asks for num_beams {options['num_beams']}; there is no beam search here")
    drawing = {name: options[name] for name in ("top_k", "top_p") if options.get(name)}
    drawing["temperature"] = float(options.get("temperature", 1.0)) if options["do_sample"] else 0.0
    return [stop for stop in options["until"] if stop], options["max_gen_toks"], drawing
