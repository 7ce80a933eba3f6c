"""Outputs of an exported model, its cache, and its values before any file is read."""

import copy

import pytest
from export_helpers import KINDS, OFFICIAL, SIZES, T, exported, greedy, random_ids, torch, works

from lm2_jax.convert.huggingface_model.configuration_lm2 import LM2Config
from lm2_jax.convert.huggingface_model.modeling_lm2 import LM2ForCausalLM, LM2PreTrainedModel


def taken_through_layers(model, ids):
    """Hidden states of a text of one segment, from hooks on the modules of the model."""
    found = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    for layer in model.model.layers[:-1]:
        layer.register_forward_hook(lambda module, args, output: found.append(output[0]))
    model.model.norm.register_forward_hook(lambda module, args, output: found.append(output))
    model(ids)
    return found


@torch.no_grad()
def test_hidden_states_are_those_of_the_layers():
    ids = random_ids(2, T)
    states = works(exported("lm2"), ids, output_hidden_states=True).hidden_states
    expected = taken_through_layers(exported("lm2"), ids)
    assert len(states) == len(expected) == 4
    assert all(torch.equal(one, other) for one, other in zip(states, expected, strict=True))


@pytest.mark.parametrize("kind", [*KINDS, "official"])
@torch.no_grad()
def test_hidden_states_over_segments(kind):
    """Asked for by argument or config; the last is what the head reads; zeros under padding."""
    model, ids = exported(kind), random_ids(2, 64)
    mask = torch.ones_like(ids)
    if kind != "official":
        mask[1, 40:] = 0
    outputs = works(model, ids, attention_mask=mask, output_hidden_states=True)
    assert [state.shape for state in outputs.hidden_states] == [(2, 64, 32)] * 4
    assert all(torch.all(state[mask == 0] == 0) for state in outputs.hidden_states)
    assert torch.equal(outputs.hidden_states[0][mask == 1], model.model.embed_tokens(ids)[mask == 1])
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    configured = model(ids, attention_mask=mask)
    assert torch.equal(configured.hidden_states[1], outputs.hidden_states[1])
    assert model(ids, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_reach_the_embeddings_that_are_returned(padded):
    model, ids = exported("lm2"), random_ids(2, 2 * T + 3)
    mask = torch.ones_like(ids)
    mask[1, : T * padded] = 0
    outputs = works(model, ids, attention_mask=mask, output_hidden_states=True)
    outputs.hidden_states[0].retain_grad()
    outputs.logits[:, -1].sum().backward()
    gradient = outputs.hidden_states[0].grad
    assert gradient is not None
    assert torch.equal(gradient.any(dim=-1), mask == 1)


@pytest.mark.parametrize("kind", [*KINDS, "official"])
def test_the_start_bank_stays_float32(kind, tmp_path):
    """In a model that is loaded, or made, in bfloat16; and no name is listed that the kind does not have."""
    model = exported(kind)
    model.save_pretrained(tmp_path)
    loaded = LM2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    made = LM2ForCausalLM._from_config(model.config, dtype=torch.bfloat16)
    for other in (loaded, made):
        assert other.lm_head.weight.dtype == torch.bfloat16
        assert all(x.dtype == torch.float32 for name, x in other.named_buffers() if name.endswith("bank"))
        assert all(any(name in one for one in other.state_dict()) for name in other._keep_in_fp32_modules_strict)


def test_attentions_are_refused():
    model, ids = exported("lm2"), random_ids(2, T)
    with pytest.raises(ValueError, match="LM2 returns no attentions"):
        model(ids, output_attentions=True)
    model.config._output_attentions = True
    with pytest.raises(ValueError, match="LM2 returns no attentions"):
        model(ids)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_with_text_is_true(kind):
    model, ids = exported(kind), random_ids(2, T + 3)
    cache = model(ids)[1]
    assert bool(cache)
    assert len(cache) == model.config.num_hidden_layers
    resumed = model(ids, past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(resumed, model(torch.cat([ids, ids], dim=1)).logits[:, T + 3 :], atol=1e-4, rtol=0)
    cache.reset()
    assert not cache


@pytest.mark.parametrize("kind", [*KINDS, "official"])
def test_values_do_without_init_weights(kind, monkeypatch):
    """Tools that build the class and fill what they have leave the rest as the constructor made it."""
    expected = {name: x for name, x in exported(kind).state_dict().items() if name.endswith(".bank")}
    empty = torch.empty

    def garbage(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(1e9) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", garbage)
    monkeypatch.setattr(LM2PreTrainedModel, "init_weights", lambda self: None)
    found = LM2ForCausalLM(LM2Config(**{**SIZES, **KINDS.get(kind, OFFICIAL)})).state_dict()
    assert not [name for name, x in found.items() if torch.any(x.abs() > 1e6)]
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("kind", [*KINDS, "official"])
@torch.no_grad()
def test_torch_exports_and_compiles_it(kind):
    """As one graph, over several segments; and what is not compiled in is refused, not read wrongly."""
    model, ids = exported(kind, num_hidden_layers=2), random_ids(2, 64 if kind == "official" else 2 * T + 3)
    expected, mask = model(ids).logits, torch.ones_like(ids)
    options = {"attention_mask": mask, "use_cache": False}
    program = works(torch.export.export, model, (ids,), options).module()
    assert torch.equal(program(ids, attention_mask=mask, use_cache=False).logits, expected)
    mask[1, 0] = 0
    with pytest.raises(RuntimeError, match="reads neither padding nor several documents"):
        program(ids, attention_mask=mask, use_cache=False)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(works(compiled, ids).logits, expected)


# --- Work that is done once ----------------------------------------------------------------------------------------


class Work(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the numbers that operations make."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.made += out.numel()
        return out


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_work_grows_as_the_text(padded):
    """One call over many segments does no more a token than over few."""
    model, work = exported("none", num_hidden_layers=1, conv_width=0), []
    for columns in (128, 1024):
        ids = random_ids(2, columns)
        mask = torch.ones_like(ids)
        mask[1, : 3 * padded] = 0
        with Work() as counted:
            model.model(ids, attention_mask=mask)
        work.append(counted.made / columns)
    assert work[1] < 1.05 * work[0]


@torch.no_grad()
def test_bank_is_projected_once_a_segment():
    """While tokens are generated one by one too."""
    model, projected = exported("lm2"), []
    model.model.layers[0].memory.read_key.register_forward_hook(lambda *args: projected.append(1))
    greedy(model, random_ids(2, 4), max_new_tokens=3 * T)
    assert len(projected) == 4
