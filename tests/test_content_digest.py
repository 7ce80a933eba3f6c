"""The checksum by which a changed file of the same size is recognised."""

import pytest

from lm2_jax.common.files import content_digest

MIB = 1 << 20


@pytest.mark.parametrize("at", [0, 1, MIB, 3 * MIB - 1])
def test_every_byte_counts(tmp_path, at):
    data = bytearray(3 * MIB)
    (tmp_path / "a").write_bytes(data)
    data[at] = 1
    (tmp_path / "b").write_bytes(data)
    assert content_digest(tmp_path / "a", blocks=3) != content_digest(tmp_path / "b", blocks=3)


@pytest.mark.parametrize(("at", "counts"), [(0, True), (9 * MIB + 4, True), (5 * MIB, True), (2 * MIB, False)])
def test_blocks_of_a_long_file_count(tmp_path, at, counts):
    """The first, the last and one in between of 9 MiB and 5 bytes."""
    data = bytearray(9 * MIB + 5)
    (tmp_path / "a").write_bytes(data)
    data[at] = 1
    (tmp_path / "b").write_bytes(data)
    assert (content_digest(tmp_path / "a", blocks=3) != content_digest(tmp_path / "b", blocks=3)) == counts


def test_sizes_count(tmp_path):
    for size in (0, 1, 2):
        (tmp_path / str(size)).write_bytes(bytes(size))
    assert len({content_digest(tmp_path / str(size)) for size in (0, 1, 2)}) == 3
