"""Two-hop questions answered by a trained model: by what became of the thing, and by how long ago it was told.

Held-out qa2 stories of the generator with one question at the end, "Where is the milk?"; any memory kind can be asked.
"""

from __future__ import annotations

import functools

from lm2_jax.common.command_line import parser_for
from lm2_jax.common.errors import UserError, run_command
from lm2_jax.common.jax_stack import check_jax_stack


def main() -> None:
    """The command."""
    parser = parser_for("inspect_answers", __doc__, "--run runs/babilong_study --segments 4 16")
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory or checkpoint of a model of stories")
    parser.add_argument("--segments", type=int, nargs="+", metavar="S", help="lengths of contexts; default 1 window")
    parser.add_argument("--count", type=int, default=512, metavar="B", help="questions at each length")
    arguments = parser.parse_args()
    check_jax_stack()

    # imported late so that --help stays fast
    from lm2_jax.inspection.two_hops import make_questions, predict_answers, table
    from lm2_jax.loading import load_run
    from lm2_jax.tokenizer import load_tokenizer

    config, model, params = load_run(arguments.run)
    if config.tokenizer.kind != "stories":
        raise UserError(f"{arguments.run}: not a model trained on stories, which the questions are about")
    lengths = arguments.segments or [config.stages[-1].segments]
    if arguments.count < 1 or min(lengths) < 1:
        raise UserError(f"--count {arguments.count}, --segments {min(lengths)}: expected 1 or more of each")
    tokenizer = load_tokenizer(config.tokenizer)
    for segments in lengths:
        questions = make_questions(config, tokenizer, segments, arguments.count)
        answers = table(questions, predict_answers(model, params, questions))
        print(f"\n{arguments.run}, contexts of {segments} segments\n\n{answers}")


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
