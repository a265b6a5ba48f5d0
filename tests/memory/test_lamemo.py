"""LaMemo against the published recurrence, token by token; as Transformer-XL; and the merge of two softmaxes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close, assert_states_close, pieces
from parity import assert_parity
from remanence import Decoder, ModelConfig, Span
from remanence.errors import UsageError
from remanence.memory.lamemo import LaMemo, blend
from remanence.mixers.relative_attention import sinusoids

VOCAB, S, H, DIM = 13, 6, 2, 16
LAYERS = [{"mixer": "relative-attention", "heads": H}]


def build(memory: int = 8, look_ahead: bool = True, layers=LAYERS * 3) -> LaMemo:
    backbone = Decoder(ModelConfig(vocab=VOCAB, dim=DIM, layers=layers, ffn=1))
    model = rm.memory("lamemo", backbone=backbone, segment=S, memory=memory, look_ahead=look_ahead)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()  # type: ignore[return-value]


def look(mixer, q: Tensor, keys: list[Tensor], values: list[Tensor], distances: list[int], place: Tensor) -> tuple[Tensor, Tensor]:
    """One query [B, H, D] and its keys: what it gets [B, H, D], and the logarithm of the softmax's sum [B, H]."""
    table = sinusoids(max(distances) + 1, DIM, q.device, q.dtype) @ mixer.to_r.weight.T
    rows = [((q + mixer.u) * k).sum(-1) + ((q + place) * table[d].unflatten(-1, (H, -1))).sum(-1) for k, d in zip(keys, distances)]
    score = torch.stack(rows, -1) * (DIM // H) ** -0.5
    return torch.einsum("bhj,bjhd->bhd", score.softmax(-1), torch.stack(values, 1)), score.exp().sum(-1).log()


def loop(model: LaMemo, ids: Tensor) -> Tensor:
    decoder, outputs = model.backbone, []
    place = [*model.place, torch.zeros(())]  # the top layer's memory goes nowhere
    embeddings: list[Tensor] = []
    past: list[list] = [[] for _ in decoder.blocks]
    for part in ids.split(S, 1):
        h, n, m = decoder.embedding(part), part.shape[1], len(embeddings)
        memory = torch.stack(embeddings, 1) if m else h[:, :0]
        embeddings = [*embeddings, *h.detach().unbind(1)][-model.memory :]
        for l, block in enumerate(decoder.blocks):
            mixer = block.mixer
            q, k, v = (list(y.unflatten(-1, (H, -1)).unbind(1)) for y in mixer.to_qkv(block.norm(torch.cat([memory, h], 1))).chunk(3, -1))
            attended, sums = [], []
            for i in range(m):
                seen = range(i + 1, m + 1)[-S:]  # tokens to its right, the segment's first the last of them
                ahead, Z = look(mixer, q[i], [k[j] for j in seen], [v[j] for j in seen], [j - i for j in seen], place[l])
                o, before = past[l][i]
                alpha = (before.exp() / (before.exp() + Z.exp()))[..., None]
                attended.append(o * alpha + ahead * (1 - alpha))
                sums.append((before.exp() + Z.exp()).log())
            for t in range(m, m + n):
                o, Z = look(mixer, q[t], k[: t + 1], v[: t + 1], list(range(t, -1, -1)), mixer.v)
                attended.append(o)
                sums.append(Z)
            past[l] = [(o.detach(), Z.detach()) for o, Z in zip(attended, sums)][-model.memory :]
            both = torch.cat([memory, h], 1) + mixer.out(torch.stack(attended, 1).flatten(2))
            both = both + block.ffn(block.ffn_norm(both))
            memory, h = both[:, :m], both[:, m:]
        outputs.append(decoder.unembedding(decoder.norm(h)))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("memory", [4, S, 15])
def test_parity_with_the_published_recurrence(memory: int) -> None:
    """Its 1e-6 in the denominator of alpha is not in the loop: 1e-6 is what is left of it."""
    model, ids = build(memory), torch.randint(VOCAB, (2, 4 * S + 3))
    got, want = model(ids).logits, loop(model, ids)
    assert_parity("lamemo", f"thu-coai/LaMemo in pre-norm blocks, memory of {memory} (re-derived)", got, want, 2e-6)
    grads = []
    for logits in (got, want):
        found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        grads.append(dict(zip(dict(model.named_parameters()), found)))
    assert_gradients_close("lamemo", *grads, tol=1e-5)


@pytest.mark.parametrize("layers", [LAYERS * 2, "attention, gated-deltanet", [*LAYERS, {"mixer": "mingru"}, *LAYERS]])
def test_parity_with_transformer_xl_without_looking_ahead(layers) -> None:
    """What is kept is then what was computed once, as long as the memory does not forget: both see all M tokens before a segment."""
    model, ids = build(4 * S, look_ahead=False, layers=layers), torch.randint(VOCAB, (2, 4 * S + 3))
    other = rm.memory("transformer-xl", backbone=model.backbone, segment=S, memory=4 * S)
    with torch.no_grad():
        assert_parity("lamemo", "Transformer-XL (alpha = 1)", model(ids).logits, other(ids).logits, 1e-10)


def test_with_relative_attention_alone_also_when_it_forgets() -> None:
    model, ids = build(4, look_ahead=False), torch.randint(VOCAB, (2, 4 * S + 3))
    other = rm.memory("transformer-xl", backbone=model.backbone, segment=S, memory=4)
    with torch.no_grad():
        assert_close("transformer-xl", model(ids).logits, other(ids).logits, 1e-10)


def test_the_merge_is_one_softmax_over_both_sides() -> None:
    score, v = 3 * torch.randn(2, 3, 9, dtype=torch.float64), torch.randn(2, 3, 9, 5, dtype=torch.float64)
    halves = []
    for part in (slice(4), slice(4, None)):
        halves += [torch.einsum("bnj,bnjd->bnd", score[..., part].softmax(-1), v[:, :, part]), score[..., part].logsumexp(-1)]
    o, Z = blend(*halves)
    assert_close("o", o, torch.einsum("bnj,bnjd->bnd", score.softmax(-1), v), 1e-6)
    assert_close("Z", Z, score.logsumexp(-1), 1e-12)


def test_nothing_leaks_from_later_in_the_segment() -> None:
    model, ids = build(), torch.randint(VOCAB, (1, 3 * S))
    for t in (1, S - 1, S, S + 1, 2 * S, 2 * S + 2):
        other = ids.clone()
        other[0, t] = (ids[0, t] + 1) % VOCAB
        with torch.no_grad():
            assert torch.equal(model(ids).logits[:, :t], model(other).logits[:, :t])


def test_rows_at_their_own_pace() -> None:
    """The laws run on a backbone that has no relative attention; here is one that has."""
    model = build(layers=[*LAYERS, {"mixer": "mingru"}, *LAYERS]).eval()
    ids = torch.randint(VOCAB, (3, 50))
    with torch.no_grad():
        whole = model(ids)
        got, state = [], None
        for piece in pieces(ids, [1, 2, 9, 30, 31]):
            out = model(piece, state)
            got.append(out.logits)
            state = out.state
        assert_close("pieces", torch.cat(got, 1), whole.logits, 1e-9)
        assert_states_close("pieces", state, whole.state, 1e-9)
        random = torch.Generator().manual_seed(0)
        span = Span(torch.rand(3, 50, generator=random) < 0.8, torch.rand(3, 50, generator=random) < 0.06)
        whole = model(ids, None, span)
        for row in range(3):
            real, starts = ids[row, span.valid[row]], span.reset[row, span.valid[row]].nonzero()[:, 0].tolist()
            documents = [document for document in pieces(real[None], starts) if document.shape[1]] if real.numel() else []
            alone = torch.cat([model(document).logits for document in documents], 1)
            assert_close(f"row {row}", whole.logits[row, span.valid[row]], alone[0], 1e-9)


def test_the_state_stays_as_large_as_it_is() -> None:
    model = rm.memory("lamemo", backbone=Decoder(ModelConfig(vocab=VOCAB, dim=8, layers=LAYERS, ffn=1)), segment=256, memory=64).eval()
    state, sizes = None, set()
    with torch.no_grad():
        for _ in range(5):
            state = model(torch.randint(VOCAB, (1, 16 * 256)), state).state
            sizes.add(state.nbytes)
    assert state.tokens == 20480 and len(sizes) == 1 and all(bool(tensor.isfinite().all()) for tensor in state.tensors())


def test_bad_sizes() -> None:
    with pytest.raises(UsageError, match="memory is 0"):
        build(0)
