"""Trains a tokenizer on text files, for `tokenizer.kind` tokenizers or sentencepiece."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import _checkout  # noqa: F401
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm2_jax.common.errors import UserError, run_command
from lm2_jax.common.files import expand_paths
from lm2_jax.config import TokenizerConfig
from lm2_jax.data.texts import is_text_ending
from lm2_jax.tokenizer import load_tokenizer

_EXAMPLES = """examples:
  python tools/train_tokenizer.py --input books/moby_dick.txt --output moby.json --vocab-size 4096
  python tools/train_tokenizer.py --input 'corpus/**/*.txt' --output corpus.model --vocab-size 8000 --kind sentencepiece

Then set tokenizer.kind to the kind and tokenizer.path to the output. The same input gives the same file.
"""


def main() -> None:
    """Parses the command line, trains, writes the file and prints how well it compresses the input."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE_OR_GLOB", help="UTF-8 text files")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the tokenizer is written")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, control tokens included")
    parser.add_argument(
        "--kind",
        choices=("tokenizers", "sentencepiece"),
        default="tokenizers",
        help="tokenizers: byte-level BPE (.json), the default; sentencepiece: BPE that falls back on bytes (.model)",
    )
    args = parser.parse_args()

    texts = _read_texts(args.input)
    model = (_train_bpe if args.kind == "tokenizers" else _train_sentencepiece)(texts, args.vocab_size)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_bytes(model)
    except OSError as error:
        raise UserError(f"--output: {args.output} cannot be written ({error.strerror})") from None

    tokenizer = load_tokenizer(TokenizerConfig(kind=args.kind, path=str(args.output)))
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    print(f"{args.output}: {tokenizer.vocab_size} tokens, {num_bytes / num_tokens:.2f} bytes per token on the input")
    if tokenizer.vocab_size < args.vocab_size:
        print(f"the input has no more to merge: fewer tokens than --vocab-size {args.vocab_size}")


def _read_texts(patterns: list[str]) -> list[str]:
    texts = []
    for path in expand_paths(patterns, "--input"):
        if not is_text_ending(path.suffix):
            raise UserError(f"--input: {path} is not plain text by its ending; write its texts into a .txt file")
        try:
            texts.append(path.read_bytes().decode())  # not read_text, which would turn \r\n into \n
        except OSError as error:
            raise UserError(f"--input: {path} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--input: {path} is not UTF-8 text, see byte {error.start}") from None
    if not any(text.strip() for text in texts):
        raise UserError("--input: the files hold no text")
    return texts


def _train_bpe(texts: list[str], vocab_size: int) -> bytes:
    """Byte-level BPE with <bos> and <eos>, as `tokenizers` JSON."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<bos>", "<eos>"]
    smallest = len(alphabet) + len(control)
    if vocab_size < smallest:
        raise UserError(f"--vocab-size {vocab_size} is too small: 256 bytes, <bos> and <eos> make {smallest}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode()


def _train_sentencepiece(texts: list[str], vocab_size: int) -> bytes:
    """Sentencepiece BPE that leaves the text as it is, as the bytes of a `.model` file."""
    lines = [line for text in texts for line in text.split("\n") if line]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 30,  # longer lines would be skipped
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).split("] ")[-1].strip() or error  # after the C++ file and condition
        raise UserError(f"--vocab-size {vocab_size}: sentencepiece refuses it: {reason}") from None
    return model.getvalue()


if __name__ == "__main__":
    run_command(main)
