"""Trains a tokenizer on text files, for `tokenizer.kind` tokenizers or sentencepiece.

Then set tokenizer.kind to the kind and tokenizer.path to the output. The same input gives the same file.
"""

from __future__ import annotations

import functools

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.common.files import expand_paths
from lm2_jax.common.storage import to_path
from lm2_jax.config import TokenizerConfig
from lm2_jax.data.texts import is_text_ending
from lm2_jax.tokenizer import load_tokenizer
from lm2_jax.tokenizer.training import train_bpe, train_sentencepiece


def main() -> None:
    """Parses the command line, trains, writes the file and prints how well it compresses the input."""
    parser = parser_for(
        "train_tokenizer",
        __doc__,
        "--input books/moby_dick.txt --output moby.json --vocab-size 4096",
        "--input 'corpus/**/*.txt' --output corpus.model --vocab-size 8000 --kind sentencepiece",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE_OR_GLOB", help="UTF-8 text files")
    parser.add_argument("--output", type=to_path, required=True, metavar="FILE", help="where the tokenizer is written")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, control tokens included")
    parser.add_argument(
        "--kind",
        choices=("tokenizers", "sentencepiece"),
        default="tokenizers",
        help="tokenizers: byte-level BPE (.json), the default; sentencepiece: BPE that falls back on bytes (.model)",
    )
    args = parser.parse_args()

    texts = _read_texts(args.input)
    model = (train_bpe if args.kind == "tokenizers" else train_sentencepiece)(texts, args.vocab_size)
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


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
