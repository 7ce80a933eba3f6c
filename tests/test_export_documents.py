"""Documents packed into a row of an exported model: a token with position 0 begins one."""

import pytest
from export_helpers import KINDS, V, exported, greedy, random_ids, torch, works

BEGINS = "0, where a document begins, or one more than the one before"


def packed(documents, columns, left):
    """Ids, positions and mask of one row; padding, on either side, has positions of its own."""
    ids, positions, mask = (torch.full((columns,), fill) for fill in (0, 7, 0))
    at = columns - sum(map(len, documents)) if left else 0
    for document in documents:
        here = slice(at, at + len(document))
        ids[here], positions[here], mask[here] = document, torch.arange(len(document)), 1
        at += len(document)
    return ids, positions, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [False, True])
def test_documents_stand_alone(kind, left):
    """Packed with others or not; and the cache goes on with each row's last document."""
    model = exported(kind)
    lengths = ((3, 19, 1, 8), (30,), (9, 9))
    rows = [[random_ids(n, seed=10 * row + i) for i, n in enumerate(ns)] for row, ns in enumerate(lengths)]
    ids, positions, mask = map(torch.stack, zip(*(packed(row, 33, left) for row in rows), strict=True))
    with torch.no_grad():
        outputs = works(model, ids, attention_mask=mask, position_ids=positions)
        expected = torch.cat([model(document[None]).logits[0] for row in rows for document in row])
        torch.testing.assert_close(outputs.logits[mask == 1], expected, atol=1e-4, rtol=0)

        new = random_ids(3, 11, seed=99)
        positions = torch.stack([torch.arange(8, 19), torch.arange(11), torch.arange(9, 20)])  # row 1 begins anew
        positions[2, 4:] = torch.arange(7)  # and so does row 2, but later
        found = model(new, position_ids=positions, past_key_values=outputs[1]).logits
        torch.testing.assert_close(
            found[0], model(torch.cat([rows[0][-1], new[0]])[None]).logits[0, 8:], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(found[1], model(new[1:2]).logits[0], atol=1e-4, rtol=0)
        before = model(torch.cat([rows[2][-1], new[2, :4]])[None]).logits[0, 9:]
        torch.testing.assert_close(found[2], torch.cat([before, model(new[2:, 4:]).logits[0]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_usual_positions_change_nothing(kind):
    """From 0, or after earlier calls; and those that generate() gives padded rows."""
    model, ids = exported(kind), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        first = works(model, ids[:, :12], position_ids=torch.arange(12)[None])
        second = model(ids[:, 12:], position_ids=torch.arange(12, 30).expand(2, -1), past_key_values=first[1])
        found = torch.cat([first.logits, second.logits], dim=1)
        torch.testing.assert_close(found, model(ids).logits, atol=1e-4, rtol=0)
    alone = greedy(model, ids[1:, 9:])
    assert torch.equal(greedy(model, ids, mask)[1, 30:], alone[0, 21:])


@pytest.mark.parametrize("kind", ["lm2", "lm2, window"])
def test_gradients_of_packed_documents(kind):
    model = exported(kind).train()
    documents = [random_ids(1, n, seed=n) for n in (20, 11, 1)]
    labels = torch.cat([torch.cat([torch.tensor([[-100]]), ids[:, 1:]], dim=1) for ids in documents], dim=1)
    positions = torch.cat([torch.arange(ids.shape[1])[None] for ids in documents], dim=1)
    loss = works(model, torch.cat(documents, dim=1), position_ids=positions, labels=labels).loss
    found = torch.autograd.grad(loss, list(model.parameters()))
    apart = sum(model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in documents[:2]) / 29
    expected = torch.autograd.grad(apart, list(model.parameters()))
    torch.testing.assert_close(loss, apart)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_other_positions_are_refused():
    model, ids = exported("lm2"), random_ids(2, 6)
    with pytest.raises(ValueError, match=BEGINS):
        model(ids, position_ids=torch.tensor([0, 1, 2, 4, 5, 6]).expand(2, -1))
    with pytest.raises(ValueError, match=r"position_ids \(3, 6\) should be \[2, 6\]"):
        model(ids, position_ids=torch.arange(6).expand(3, -1))
    assert model(ids).logits.shape == (2, 6, V)
