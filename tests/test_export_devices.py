"""An exported model under accelerate: its hooks copy, move and unload what a model with state must not lose."""

import pytest
from export_helpers import KINDS, T, exported, greedy, logits_in_pieces, random_ids, torch, works

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (requirements-dev.txt)")

IDS = random_ids(2, 2 * T + 3)
MASK = torch.ones_like(IDS)
MASK[1, : T + 3] = 0


@torch.no_grad()
def results(model):
    """Logits over several segments, at once, padded and in pieces; and tokens."""
    padded = model(IDS, attention_mask=MASK).logits * MASK[..., None]
    return model(IDS).logits, padded, logits_in_pieces(model, IDS, 5), greedy(model, IDS, MASK)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def hooked(model):
    places = {"model": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)


def offloaded(model):
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


@pytest.mark.parametrize("placed", [hooked, offloaded])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_change_nothing(kind, placed):
    expected = results(exported(kind))
    assert_same(works(results, placed(exported(kind))), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_model_on_disk(kind, tmp_path):
    model = exported(kind)
    model.save_pretrained(tmp_path / "model")
    half = sum(x.nbytes for x in model.state_dict().values()) // 2
    options = {"device_map": "auto", "max_memory": {"cpu": half}, "offload_folder": tmp_path / "disk"}
    split = works(type(model).from_pretrained, tmp_path / "model", **options).eval()
    assert {"cpu", "disk"} == set(split.hf_device_map.values())
    assert_same(works(results, split), results(model))


def test_official_with_its_weights_unloaded():
    ids = random_ids(2, 64)
    with torch.no_grad():
        expected = exported("official")(ids).logits
        found = works(offloaded(exported("official")), ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [*KINDS, "official"])
def test_every_tensor_has_a_device_where_the_model_is_split(kind):
    """Also buffers, which a map by sub-modules leaves out where they belong to the split module itself."""
    model = exported(kind)
    size = sum(x.nbytes for x in model.state_dict().values())
    places = accelerate.infer_auto_device_map(
        model, {"cpu": size // 2, "disk": 2 * size}, no_split_module_classes=["LM2Layer"]
    )
    unplaced = [name for name in model.state_dict() if not any(name.startswith(f"{place}.") for place in places)]
    assert not unplaced
    assert len(places) > 2


@pytest.mark.parametrize("kind", ["lm2", "rmt", "lm2, window"])
@pytest.mark.parametrize("padded", [False, True])
def test_state_follows_the_blocks_device(kind, padded):
    """The device "meta" computes shapes alone, but refuses, as a second GPU does, to mix its tensors with others."""
    model = exported(kind)
    for layer in model.model.layers[1:]:
        layer.to("meta")
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("meta"))
    model.model.norm.to("meta")
    with torch.no_grad():
        first = works(model.model, IDS[:, :T], attention_mask=MASK[:, :T] if padded else None)
        if kind != "rmt":  # where what the last block says on meta is the next memory
            second = model.model(IDS[:, T:], past_key_values=first[1])
            assert second[0].device.type == "meta"
    assert first[0].shape == (2, T, 32)
    assert first[1].blocks[2].keys.device.type == "meta"
