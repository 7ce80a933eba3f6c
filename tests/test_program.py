"""Reading compiled programs: trip counts, products, collectives; and the figures of two-layer variants for TPUs."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from lm2_jax.common.errors import UserError
from lm2_jax.compiled import costs, hlo
from lm2_jax.compiled.explain import explain_sharding
from lm2_jax.compiled.report import describe, too_large
from lm2_jax.compiled.roofline import roofline
from lm2_jax.config import load_config
from lm2_jax.measurements import race
from lm2_jax.measurements.configs import table, topology_of
from lm2_jax.parallel.chips import CHIPS

ROOT = Path(__file__).parents[1]
RECORDED = json.loads((ROOT / "tests" / "compiled_figures.json").read_text())


def counted(function, *arguments, mesh_shape=None):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return costs.count(hlo.parse(text), mesh_shape or {"data": 1, "fsdp": 8, "tensor": 1})


def test_products_in_loops_are_counted_every_time():
    weights, x = jnp.ones((5, 16, 16)), jnp.ones((8, 16))

    def inner(x, weight):
        return jax.lax.fori_loop(2, 9, lambda _, y: jnp.sin(y @ weight), x), None

    flops = counted(lambda x: jax.lax.scan(inner, x, weights)[0], x).matmul_flops
    assert flops == 5 * 7 * (2 * 8 * 16 * 16)


@pytest.mark.parametrize(("stride", "padding"), [(1, (1, 1)), (2, (0, 3))])
def test_a_convolution_counts_no_padding(stride, padding):
    x, kernel = jnp.ones((3, 10, 4)), jnp.ones((3, 4, 6))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (stride,), [padding], dimension_numbers=("NHC", "HIO", "NHC"))

    out = convolve(x, kernel).shape[1]
    inside = sum(0 <= o * stride + k - padding[0] < 10 for o in range(out) for k in range(3))
    assert counted(convolve, x, kernel).matmul_flops == 2 * 3 * inside * 4 * 6


def test_collectives_are_counted_with_their_bytes_and_axis():
    mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def local(x):
        def step(y, _):
            whole = jax.lax.all_gather(y, "fsdp", tiled=True)
            return jax.lax.psum_scatter(jnp.sin(whole), "fsdp", tiled=True), None

        y, _ = jax.lax.scan(step, x, length=3)
        return jax.lax.psum(y, "data")

    spec = PartitionSpec(("data", "fsdp"))
    split = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=PartitionSpec("fsdp"), check_vma=False)
    found = counted(split, jnp.ones((64, 32)), mesh_shape=dict(mesh.shape)).collectives
    part, whole = 8 * 32 * 4, 4 * 8 * 32 * 4
    sent = {(c.kind, c.axis): (c.count, c.wire_bytes, c.in_loop_bytes) for c in found}
    assert sent[("all-gather", "fsdp")] == (3, 3 * whole * 3 / 4, whole)
    assert sent[("reduce-scatter", "fsdp")] == (3, 3 * whole * 3 / 4, whole)
    assert sent[("all-reduce", "data")] == (1, part * 2 * 1 / 2, 0)


WRITES = """
HloModule writes

%scatter_fusion (cache: bf16[64,128], index: s32[2,1], new: bf16[2,128]) -> bf16[64,128] {
  %cache = bf16[64,128]{1,0} parameter(0)
  %index = s32[2,1]{1,0} parameter(1)
  %new = bf16[2,128]{1,0} parameter(2)
  ROOT %written = bf16[64,128]{1,0} scatter(%cache, %index, %new), to_apply=%second
}

ENTRY %main (cache: bf16[64,128], index: s32[2,1], new: bf16[2,128]) -> bf16[64,128] {
  %cache = bf16[64,128]{1,0} parameter(0)
  %index = s32[2,1]{1,0} parameter(1)
  %new = bf16[2,128]{1,0} parameter(2)
  %fetch = ((bf16[64,128]{1,0}), bf16[8,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%cache), slice={[0:8], [0:128]}
  %fetched = bf16[8,128]{1,0:S(1)} slice-done(%fetch)
  %rows = bf16[64,128]{1,0} scatter(%cache, %index, %new), to_apply=%second
  ROOT %fused = bf16[64,128]{1,0} fusion(%rows, %index, %new), kind=kLoop, calls=%scatter_fusion
}
"""


def test_what_is_written_in_place_or_fetched_in_part_counts_as_that_part():
    program, new, index = hlo.parse(WRITES), 2 * 128 * 2, 2 * 4
    main = program.computations["main"]
    traffic = {name: costs.memory_bytes(main.instructions[name], main, program) for name in main.instructions}
    fetched = 8 * 128 * 2 + 4  # into the chip's own memory, which is not main memory; and a semaphore
    expected = {"fetch": fetched, "fetched": 0, "rows": 2 * new, "fused": 2 * new + index}
    assert {name: traffic[name] for name in expected} == expected


SLICES = """HloModule slices

%inner (whole: bf16[64,128], i: s32[]) -> bf16[8,128] {
  %whole = bf16[64,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = bf16[8,128]{1,0} dynamic-slice(%whole, %i, %zero), dynamic_slice_sizes={8,128}
}

%outer (whole.1: bf16[64,128], i.1: s32[], w: bf16[128,128]) -> bf16[8,128] {
  %whole.1 = bf16[64,128]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %w = bf16[128,128]{1,0} parameter(2)
  %part.1 = bf16[8,128]{1,0} fusion(%whole.1, %i.1), kind=kLoop, calls=%inner
  ROOT %y = bf16[8,128]{1,0} convolution(%part.1, %w), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[64,128], n: s32[], v: bf16[128,128]) -> bf16[8,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %v = bf16[128,128]{1,0} parameter(2)
  ROOT %product = bf16[8,128]{1,0} fusion(%x, %n, %v), kind=kOutput, calls=%outer
}
"""


def test_what_a_fusion_inside_a_fusion_slices_counts_as_that_part():
    program = hlo.parse(SLICES)
    main = program.computations["main"]
    part, index, weight = 8 * 128 * 2, 4, 128 * 128 * 2
    assert costs.memory_bytes(main.instructions["product"], main, program) == 2 * part + index + weight


def test_replica_groups_of_every_notation():
    mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    for written in (
        "replica_groups={{0,1,2,3},{4,5,6,7}}",
        "replica_groups=[2,4]<=[8]",
        "replica_groups=mesh['a'=2,'b'=4] {'b'}",
        "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
    ):
        assert costs.mesh_axes(costs.device_groups(f"x, {written}, y=1", 8), mesh) == "fsdp", written
    for written in (
        "replica_groups={{0,4},{1,5}}",
        "replica_groups=[4,2]<=[2,4]T(1,0)",
        "replica_groups=mesh['a'=2,'b'=4] {'a'}",
    ):
        assert costs.mesh_axes(costs.device_groups(written, 8), mesh) == "data", written


def test_the_roofline_is_the_longest_part():
    figures = costs.Costs(197e12, 0.0, 0, 1.5e9 / 2, 819e9 / 4, 0.0, [costs.Collective("all-gather", "fsdp", 1, 100e9)])
    roof = roofline(figures, CHIPS["v5e"], 98.5e12)
    assert (roof.compute, roof.memory, roof.interconnect, roof.scheduled) == (1.0, 0.25, 0.5, 0.5)
    assert (roof.binds, roof.step, roof.mfu) == ("compute", 1.0, 0.5)


def test_a_loop_that_cannot_be_followed_is_said():
    text = jax.jit(lambda x: jax.lax.while_loop(lambda y: y[0] < 5.0, lambda y: y * 2, x)).lower(jnp.ones(3))
    with pytest.raises(ValueError, match="loop"):
        costs.count(hlo.parse(text.compile().as_text()), {"data": 1, "fsdp": 1, "tensor": 1})


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_sharding_is_explained(name):
    config = load_config(
        ROOT / "configs" / name, ["model.vocab_size=96", "data.batch_size=8", "optim.accumulation_steps=1"]
    )
    text = explain_sharding(config, jax.devices())
    assert "mesh: data 1 x fsdp 8 x context 1 x tensor 1, 8 devices" in text
    assert "embedding" in text and "parameters: " in text and "on one device" in text


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.50G) exceeds "
        "available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
        "15.75G hbm. Exceeded hbm capacity by 4.75G.",
    ],
)
def test_what_does_not_fit_says_by_how_much_and_what_to_change(message):
    config = load_config(ROOT / "configs" / "lm2_125m.yaml", ["train.remat=none"])
    text = describe(too_large(message, CHIPS["v5e"], config))
    assert "needs 20.50 GiB, 4.75 more than available" in text
    for setting in ("train.remat=block", "optim.accumulation_steps=2", "segments_per_window=2", "more chips"):
        assert setting in text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_names_its_topology(path):
    assert topology_of(path).partition(":")[0] in CHIPS


def test_a_config_without_a_topology_is_said(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {steps: 3}\n")
    with pytest.raises(UserError, match="no comment names"):
        topology_of(tmp_path / "mine.yaml")


def test_the_table_shows_what_does_not_fit(tmp_path):
    figures = {"topology": "v5e:1x1", "slices": 1, "parameters": 10**9, "programs": {"train": {"fits": False}}}
    (tmp_path / "big.json").write_text(json.dumps(figures))
    assert "| big | v5e:1x1 | 1,000 M | | does not fit |" in table(tmp_path)


def test_the_page_has_the_table_of_the_race():
    page = (ROOT / "docs" / "results" / "performance.md").read_text(encoding="utf-8")
    assert race.table(ROOT / "docs" / "results" / "race") in page


# --- libtpu --------------------------------------------------------------------------------------------------------


def aot(*arguments):
    command = [sys.executable, "-m", "lm2_jax.aot", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def needs_libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")


def test_an_unknown_topology_is_a_users_mistake():
    done = aot("--config", "configs/lm2_1b7.yaml", "--topology", "v9:4x4")
    assert done.returncode == 2 and "v9:4x4" in done.stderr and "Traceback" not in done.stderr


def test_recorded_figures_are_of_the_oldest_and_the_newest_jax():
    """And of the libtpu that requirements-dev.txt has for each."""
    requirements = (ROOT / "requirements-dev.txt").read_text()
    recorded = [record["versions"] for record in RECORDED["figures"]]
    assert [version["libtpu"] for version in recorded] == re.findall(r"^libtpu==(\S+);", requirements, re.MULTILINE)
    assert [version["jax"].split(".")[:2] for version in recorded] == [["0", "10"], ["0", "12"]]


SLOW = ("llama_1b7", "full attention gathered", "full attention in a ring")


@pytest.mark.parametrize(
    "name", ["lm2_1b7", "lm2_1b7 decode", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_compiled_figures_are_those_recorded(name, tmp_path):
    """Peak, bytes sent, cycles and traffic of a two-layer variant, within 2% of what was recorded."""
    needs_libtpu()
    found = importlib.metadata.version("libtpu")
    known = {record["versions"]["libtpu"]: record[name] for record in RECORDED["figures"]}
    if found not in known:
        pytest.skip(f"recorded for libtpu {' and '.join(known)}; found {found}")
    output = tmp_path / "figures.json"
    done = aot(*RECORDED["arguments"][name], "--output", output)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(output.read_text())["programs"].values()
    for figure, value in known[found].items():
        assert figures[figure] == pytest.approx(value, rel=0.02), figure
    assert figures["involuntary_rematerialisations"] == 0
