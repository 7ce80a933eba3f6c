"""Where the cycles of a compiled program go: lines of the package, and trips of loops."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import pytest

from lm2_jax.compiled import hlo
from lm2_jax.compiled.where import table, where
from lm2_jax.model import layers
from lm2_jax.parallel.chips import CHIPS

LOOP = """HloModule jit_f, is_scheduled=true

FileNames
1 "/checkout/lm2_jax/model/layers.py"
2 "/elsewhere/flax/linen/module.py"
3 "/checkout/lm2_jax/model/block.py"

FunctionNames
1 "Block.__call__"
2 "wrapped"
3 "dense"

FileLocations
1 {file_name_id=3 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=8 end_line=8 column=1 end_column=2}
3 {file_name_id=1 function_name_id=3 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}


%fused (p0: bf16[128,128], p1: bf16[128,128]) -> bf16[128,128] {
  %p0 = bf16[128,128]{1,0} parameter(0)
  %p1 = bf16[128,128]{1,0} parameter(1)
  ROOT %product = bf16[128,128]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf,
    metadata={op_name="jit(f)/transpose(jvp())/dot_general" stack_frame_id=3}
}

%body (state: (s32[], bf16[128,128])) -> (s32[], bf16[128,128]) {
  %state = (s32[], bf16[128,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[128,128]{1,0} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %fusion = bf16[128,128]{1,0} fusion(%x, %x), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"1000"}
  %moved = bf16[128,128]{0,1} copy(%fusion), backend_config={"estimated_cycles":"10"}
  ROOT %out = (s32[], bf16[128,128]{1,0}) tuple(%next, %moved)
}

%condition (state: (s32[], bf16[128,128])) -> pred[] {
  %state = (s32[], bf16[128,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %six = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %six), direction=LT
}

ENTRY %main (x: bf16[128,128]) -> (s32[], bf16[128,128]) {
  %x = bf16[128,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[128,128]{1,0}) tuple(%zero, %x)
  ROOT %loop = (s32[], bf16[128,128]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def places_of(text):
    return where(hlo.parse(text), text, CHIPS["v5e"])


def test_instructions_in_loops_are_counted_every_time_and_named_by_our_lines():
    product, copy, *_ = places_of(LOOP)
    assert (product.kind, product.turn, product.count, product.cycles) == ("product", "backward", 6, 6000)
    assert product.source == "model/layers.py:9 dense < model/block.py:7 Block.__call__"
    assert (copy.kind, copy.count, copy.cycles, copy.memory_bytes) == ("copy", 6, 60, 6 * 2 * 128 * 128 * 2)


@pytest.mark.parametrize("turn", ["forward", "recomputed", "backward"])
def test_the_turn_of_a_compiled_product_is_told(turn):
    def objective(weight, x):
        layer = jax.checkpoint(lambda x: jnp.sin(layers.dense(x, weight)), prevent_cse=False)
        return jnp.sum(jax.lax.scan(lambda x, _: (layer(x), None), x, length=3)[0])

    text = jax.jit(jax.value_and_grad(objective)).lower(jnp.ones((16, 16)), jnp.ones((8, 16))).compile().as_text()
    source, first = inspect.getsourcelines(layers.dense)
    line = first + next(number for number, text in enumerate(source) if "@" in text)
    found = [place for place in places_of(text) if (place.kind, place.turn) == ("product", turn)]
    assert sum(place.count for place in found) == {"forward": 3, "recomputed": 3, "backward": 6}[turn]
    assert all(place.source.startswith(f"model/layers.py:{line} dense") for place in found)


def test_the_table_has_the_largest_first():
    rows = [dataclasses.asdict(place) for place in places_of(LOOP)]
    header, first, *_ = table(rows, most=1).splitlines()
    assert "M cycles" in header and "99.0%" in first and "model/layers.py:9 dense" in first
