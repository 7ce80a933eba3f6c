"""Training an exported model with other people's loops: checkpointing, DDP, adapters, and trl."""

import os
import subprocess
import sys

import pytest
from export_helpers import KINDS, T, exported, gradients, random_ids, torch, works
from packaging.version import Version


@pytest.mark.parametrize("kind", [*KINDS, "official"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(kind, use_reentrant):
    """Over several segments, of rows in step and of padded ones."""
    model, ids = exported(kind).train(), random_ids(3, 64)
    masks = [None] if kind == "official" else [None, (torch.arange(64) >= torch.tensor([[0], [9], [3]])).long()]
    expected = [gradients(model, ids, attention_mask=mask) for mask in masks]
    works(model.gradient_checkpointing_enable, {"use_reentrant": use_reentrant})
    found = [gradients(model, ids, attention_mask=mask) for mask in masks]
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind):
    """A text that ends in its first segment writes nothing; DDP waits for all parameters, so writing has zeros."""
    _, found = gradients(exported(kind).train(), random_ids(2, T))
    assert not [name for name, gradient in found.items() if gradient is None]
    written = {name for name, gradient in found.items() if not gradient.any()}
    assert all("memory." in name for name in written)
    assert bool(written) == kind.startswith(("lm2", "armt"))


def _train_in_parallel(kind, store):
    """Two steps: DDP complains in the second one about what the first one left out."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel = torch.nn.parallel.DistributedDataParallel(exported(kind).train())
    for step in range(2):
        ids = random_ids(2, 5, seed=step)
        works(parallel, ids, labels=ids).loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_ddp_reads_short_texts(kind, tmp_path):
    """In a process of its own, which ends without taking the group down: that may wait for ever (torch 2.13.0)."""
    code = f"import os, {__name__} as t; t._train_in_parallel({kind!r}, {str(tmp_path / 'store')!r}); os._exit(0)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_adapters_of_the_memory_train_on_short_texts(tmp_path):
    """peft: zero gradients for adapters of writing, none for what is frozen; saved and loaded again, the same."""
    peft = pytest.importorskip("peft", reason="peft is not installed (requirements-dev.txt)")
    settings = {
        "r": 2,
        "target_modules": ["q_proj", "read_key", "write_query", "forget_gate"],
        "task_type": "CAUSAL_LM",
    }
    model = peft.get_peft_model(exported("lm2"), peft.LoraConfig(**settings)).train()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen
    works(model.gradient_checkpointing_enable, {"use_reentrant": False})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for length in (5, 30):
        _, found = gradients(model, random_ids(2, length))
        assert not [name for name, gradient in found.items() if gradient is None]
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(exported("lm2"), tmp_path).eval()
    with torch.no_grad():
        ids = random_ids(2, 30)
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not torch.equal(again(input_ids=ids).logits, exported("lm2")(ids).logits)


@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_with_its_defaults(packing, tmp_path):
    """Which checkpoint, and pack by position_ids: the loss is that of the documents apart."""
    trl = pytest.importorskip("trl", reason="trl is not installed (requirements-dev.txt)")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (requirements-dev.txt)")
    tokenizers = pytest.importorskip("tokenizers")
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    documents = [random_ids(n, seed=n).tolist() for n in (20, 11, 5, 9)]
    dataset = datasets.Dataset.from_list([{"input_ids": ids} for ids in documents])
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "bf16": False, "use_cpu": True}
    settings = trl.SFTConfig(
        tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=4, packing=packing, max_length=48, **quiet
    )
    model = exported("lm2")
    with torch.no_grad():
        counts = [len(ids) - 1 for ids in documents]
        losses = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in documents]
    total, targets = sum(n * loss for n, loss in zip(counts, losses, strict=True)), sum(counts)
    trainer = trl.SFTTrainer(model, args=settings, train_dataset=dataset, processing_class=tokenizer)
    works(trainer.train)
    assert model.is_gradient_checkpointing
    if not packing and Version(transformers.__version__) < Version("5.12"):
        targets += len(documents)  # a Trainer that counts a document's first token, which has no loss
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / targets, rel=1e-4)
