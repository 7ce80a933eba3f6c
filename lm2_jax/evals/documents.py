"""Documents that perplexity is measured on: given files, or what the run held out."""

from __future__ import annotations

from lm2_jax.common.errors import UserError
from lm2_jax.common.files import expand_paths
from lm2_jax.common.storage import AnyPath
from lm2_jax.data.documents import BinSource, Document, DocumentSource, JsonLinesSource, TextSource
from lm2_jax.data.pipeline import Pipeline, held_out_files
from lm2_jax.data.texts import is_text_ending
from lm2_jax.evals.model import EvalModel

_KEY = "eval.perplexity.path"
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".bin": "bin"}


def open_documents(loaded: EvalModel) -> tuple[DocumentSource, list[AnyPath]]:
    """The documents of eval.perplexity.path, or else the run's validation documents, and the files that hold them.

    Raises UserError for files that are missing, damaged or of several kinds, and if nothing was held out.
    """
    config = loaded.config
    settings = config.eval.perplexity
    if settings.path is None:
        return _held_out_documents(loaded)
    paths = expand_paths(settings.path, _KEY)
    kinds = {settings.source or _kind(path) for path in paths}
    if len(kinds) > 1:
        raise UserError(f"{_KEY}: files of several kinds ({', '.join(sorted(kinds))}); evaluate one kind at a time")
    if kinds == {"bin"}:
        return BinSource(paths, config.model.vocab_size, config.data.begin_id, _KEY), paths
    if config.has_tokenizer and config.tokenizer.kind == "stories":
        raise UserError(
            f"{_KEY}: tokenizer.kind stories knows only the generator's words; evaluate a model with another tokenizer"
        )
    if kinds == {"jsonl"}:
        return JsonLinesSource(paths, loaded.tokenizer, _KEY), paths
    return TextSource(paths, loaded.tokenizer, settings.document_separator, _KEY), paths


def _kind(path: AnyPath) -> str:
    """The kind of document that a file's ending tells. Raises UserError for one that tells none."""
    kind = _KINDS.get(path.suffix.lower(), "text" if is_text_ending(path.suffix) else None)
    if kind is None:
        raise UserError(
            f"{_KEY}: {path} is neither text (.txt), .jsonl nor .bin by its ending; set eval.perplexity.source to the "
            "kind that it is"
        )
    return kind


def _held_out_documents(loaded: EvalModel) -> tuple[DocumentSource, list[AnyPath]]:
    config = loaded.config
    if config.data.source == "stories":
        raise UserError(f"{_KEY} is missing: name text files, JSON lines or .bin shards to read")
    pipeline = Pipeline(config, None if config.data.source == "bin" else loaded.tokenizer)
    _, source = pipeline.sources(config.stages[-1])
    if source is None:
        raise UserError(f"{_KEY} is missing, and the run held nothing out (data.validation_fraction 0)")
    return source, held_out_files(config.data)


def predicted_bytes(document: Document, loaded: EvalModel) -> int | None:
    """Bytes of the text that is predicted, None for token ids; the first token is not, if no other comes before it."""
    if document.text_bytes is None or loaded.tokenizer.special.prefix_ids:
        return document.text_bytes
    return document.text_bytes - len(loaded.tokenizer.decode(document.tokens[:1]).encode())
