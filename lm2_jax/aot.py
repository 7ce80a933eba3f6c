"""Compiles a run's programs for TPUs that are not there and reports what they need.

    python -m lm2_jax.aot --config configs/lm2_1b7.yaml --topology v5e:4x4

The programs are the train step of `train`, and the step that decodes one token a lane.
"""

from __future__ import annotations

import functools

from lm2_jax.common.command_line import aot_arguments
from lm2_jax.common.errors import TrainingFailed, UserError, run_command
from lm2_jax.common.jax_stack import check_jax_stack
from lm2_jax.common.storage import has_directory


def main() -> None:
    """The command."""
    arguments = aot_arguments()
    if arguments.output is not None and not has_directory(arguments.output):
        raise UserError(f"--output: found {arguments.output}; its directory does not exist")
    check_jax_stack("tpu")

    # imported late so that --help stays fast
    import json

    from lm2_jax.compiled import topology
    from lm2_jax.compiled.explain import explain_sharding
    from lm2_jax.compiled.remat import best_policy, explain_remat
    from lm2_jax.compiled.report import compile_for, describe
    from lm2_jax.compiled.where import table
    from lm2_jax.config import load_config, replace
    from lm2_jax.tokenizer import with_vocabulary

    config = with_vocabulary(load_config(arguments.config, arguments.set))
    topology.prepare()
    devices, chip = topology.devices_of(arguments.topology, arguments.slices)
    if arguments.explain_sharding:
        print(explain_sharding(config, devices))
        return
    if arguments.explain_remat:
        print(explain_remat(config, devices, chip, print))
        return
    if config.train.remat == "auto" and arguments.program != "decode":
        config = replace(config, train={"remat": best_policy(config, devices, chip, print)})
    figures = compile_for(
        config,
        arguments.topology,
        arguments.slices,
        arguments.program,
        log=print,
        keep=arguments.hlo,
        with_places=arguments.where,
    )
    for name, program in figures["programs"].items():
        print(f"\n{name} step\n" + describe(program))
        if "where" in program:
            print("\n" + table(program["where"]))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    over = [name for name, program in figures["programs"].items() if not program["fits"]]
    if over:
        raise TrainingFailed(f"does not fit {arguments.topology}: {' and '.join(over)} step")


command = functools.partial(run_command, main)

if __name__ == "__main__":
    command()
