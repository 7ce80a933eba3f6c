"""A plain reference of the banks of kinds lm2 and ntm, in NumPy: one document and one bank, segment by segment."""

import numpy as np
from slow_llama import rms_norm, sigmoid, silu, softmax


def read_banks(config, p, x, cuts):
    """What the tokens of a document read of a block's bank, which each segment's end rewrites; cuts: where they end."""
    memory, eps = config.memory, config.model.norm_eps
    bank, read = np.eye(memory.num_slots, config.spec.memory_width), []
    heads = np.eye(memory.num_slots)[[h * memory.num_slots // memory.num_heads for h in range(memory.num_heads)]]
    for chunk in np.split(x, cuts):
        if not len(chunk):
            continue
        slots = rms_norm(bank, p["bank_norm"], eps)
        found = _attend(chunk @ p["read_query"], slots @ p["read_key"], slots @ p["read_value"], memory.num_heads)
        found = found @ p["read_output"]
        read.append(sigmoid(found @ p["output_gate"] + p["output_gate_bias"]) * found)
        if memory.kind == "ntm":
            bank, heads = _write_ntm(config, p, chunk, bank, heads)
        else:
            bank = _write_lm2(config, p, chunk, bank)
    return np.concatenate(read)


def _write_lm2(config, p, x, bank):
    memory, eps = config.memory, config.model.norm_eps
    slots = rms_norm(bank, p["bank_norm"], eps)
    share = np.ones((len(bank), len(x)))
    if memory.write == "top_k":
        scores = sigmoid(x @ p["router"])
        for t in range(len(x)):
            for slot in range(len(bank)):
                better = sum(scores[t] > scores[t, slot])
                share[slot, t] = scores[t, slot] if better < memory.write_slots else 0
    u = np.zeros_like(bank)
    for slot in range(len(bank)):
        may = np.flatnonzero(share[slot])
        if len(may):
            query, bias = slots[slot : slot + 1] @ p["write_query"], np.log(share[slot, may])
            u[slot] = _attend(query, x[may] @ p["write_key"], x[may] @ p["write_value"], memory.num_heads, bias)
    u = u @ p["write_output"]
    new = rms_norm(slots + u, p["candidate_norm"], eps)
    new = rms_norm(new + silu(new @ p["candidate_up"]) @ p["candidate_down"], p["candidate_norm_2"], eps)
    gate = sigmoid(u @ p["forget_gate"] + np.tanh(bank) @ p["forget_gate_bank"] + p["forget_gate_bias"])
    new = (1 - gate) * np.tanh(new) + gate * bank
    return bank + share.max(axis=1, keepdims=True) * (new - bank)


def _write_ntm(config, p, x, bank, heads):
    """Slots after a segment, and where the heads are; slot by slot, from equations 3 to 9 of the paper."""
    N, moved, keep, add = len(bank), np.zeros_like(heads), np.ones_like(bank), np.zeros_like(bank)
    found = _attend(p["write_query"], x @ p["write_key"], x @ p["write_value"], config.memory.num_heads)
    for h, r in enumerate(found):
        key, erase, new = r @ p["head_key"][h], sigmoid(r @ p["head_erase"][h]), np.tanh(r @ p["head_add"][h])
        bias = p["head_controls_bias"].reshape(len(heads), -1)[h]
        strength, gate, back, stay, forth, sharpness = r @ p["head_controls"][h] + bias
        cosine = [key @ slot / np.linalg.norm(key) / max(np.linalg.norm(slot), 1e-9) for slot in bank]
        content = softmax(_softplus(strength) * np.array(cosine))
        gated = sigmoid(gate) * content + (1 - sigmoid(gate)) * heads[h]
        back, stay, forth = softmax(np.array([back, stay, forth]))
        shifted = np.array([back * gated[(i + 1) % N] + stay * gated[i] + forth * gated[i - 1] for i in range(N)])
        moved[h] = shifted ** (1 + _softplus(sharpness)) / sum(shifted ** (1 + _softplus(sharpness)))
        for i in range(N):
            keep[i] *= 1 - moved[h, i] * erase
            add[i] += moved[h, i] * new
    return bank * keep + add, moved


def _attend(q, k, v, heads, bias=0.0):
    q, k, v = (a.reshape(len(a), heads, -1) for a in (q, k, v))
    weights = softmax(np.einsum("qhm,khm->hqk", q, k) / q.shape[-1] ** 0.5 + bias)
    return np.einsum("hqk,khm->qhm", weights, v).reshape(len(q), -1)


def _softplus(x):
    return np.log1p(np.exp(x))
