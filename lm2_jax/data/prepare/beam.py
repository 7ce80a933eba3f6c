"""Preparing data on Apache Beam: the steps of `shards.py` as a pipeline, for more than one machine.

Groups of inputs are read in parallel, their chunks are spread over all workers and tokenised, and the results of a
shard are collected and written. Inputs and output must be paths that every worker sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lm2_jax.common.errors import UserError
from lm2_jax.data.prepare.chunks import Input
from lm2_jax.data.prepare.shards import MakeShards, Report, Settings, finish_shard, is_whole, read_tasks, run_task


def run_on_beam(options: Sequence[str] = ()) -> MakeShards:
    """Makes shards on Beam; options are those of its command line, by default for this machine.

    Raises UserError if Beam is not installed or does not know the options.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("--runner beam needs apache-beam; pip install apache-beam") from None
    pipeline_options = PipelineOptions(list(options) or ["--runner=FnApiRunner"])

    def run(
        groups: Sequence[tuple[Input, ...]], settings: Settings, done: Mapping[str, Report], vocab_size: int
    ) -> None:
        whole_shards = set(done)
        left = [(number, group) for number, group in enumerate(groups) if not is_whole(number, group, done)]
        with beam.Pipeline(options=pipeline_options) as pipeline:
            tasks = (
                pipeline
                | "groups" >> beam.Create(left)
                | "in parallel" >> beam.Reshuffle()
                | "read" >> beam.FlatMap(lambda group: read_tasks(*group, settings.shard_bytes))
                | "what is left" >> beam.Filter(lambda task: task.shard not in whole_shards)
            )
            results = (
                tasks
                | "over all workers" >> beam.Reshuffle()
                | "tokenise" >> beam.Map(lambda task: (task.shard, (task.order, run_task(task, settings))))
            )
            shards = results | "of a shard" >> beam.GroupByKey()

            def write(shard: tuple) -> None:
                name, numbered = shard
                in_order = [result for _, result in sorted(numbered, key=lambda pair: pair[0])]
                finish_shard(name, in_order, settings, vocab_size)

            _ = shards | "write" >> beam.Map(write)

    return run
