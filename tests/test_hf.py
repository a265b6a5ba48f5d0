"""Models of transformers behind the Model interface, and Models behind that of transformers, on tiny random configurations."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import remanence as rm
from helpers import assert_close, assert_gradients_close, assert_states_close, pieces
from parity import assert_parity
from remanence import Decoder, Model, ModelConfig, Span, State
from remanence.errors import StateError, UsageError
from remanence.hf import CausalLM, register, to_hf

transformers = pytest.importorskip("transformers", reason="the models are those of transformers (extra 'hf')")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, T = 29, 30
BASE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
RECURRENT = {"state_size": 4, "time_step_rank": 4}
WINDOWED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 1,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
          "shared_expert_intermediate_size": 8}  # fmt: skip
OWN = {
    "mistral": {"sliding_window": 5},
    "gemma2": WINDOWED,
    "mamba": RECURRENT,
    "mamba2": {"head_dim": 8, "num_heads": 4, "n_groups": 1, "state_size": 4, "chunk_size": 4},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
              "num_experts": 2, "num_experts_per_tok": 1},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "attn_layer_indices": [1],
              "mamba_chunk_size": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen3_next": LINEAR,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "deepseek_v3": {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8,
                    "first_k_dense_replace": 1, "num_key_value_heads": 2},
}  # fmt: skip
MAIN = ["llama", "gpt2", "qwen3", "mamba", "gpt_neox"]
MORE = ["mistral", "gemma2", "mamba2", "jamba", "bamba", "qwen3_next", "opt", "deepseek_v3"]
main = pytest.mark.parametrize("name", MAIN)
every = pytest.mark.parametrize("name", MAIN + MORE)


def make(name: str, **own: Any) -> Any:
    """A tiny causal language model of transformers, its weights moved off their initial values."""
    options = BASE | OWN.get(name, {}) | own
    if name == "mamba2":
        options = {key: value for key, value in options.items() if key not in ("num_attention_heads", "num_key_value_heads")}
    kernel = {"attn_implementation": options.pop("attn_implementation")} if "attn_implementation" in options else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **options), **kernel).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
    return model


@functools.cache
def wrapped(name: str) -> CausalLM:
    return CausalLM(make(name)).eval()  # type: ignore[return-value]


def run(model: Model, parts: list[Tensor], state: State | None = None) -> tuple[Tensor, State]:
    outputs = []
    for part in parts:
        before = state.digest() if state else ""
        out = model(part, state)
        assert state is None or state.digest() == before
        state = out.state
        outputs.append(out.logits)
    assert state is not None
    return torch.cat(outputs, 1), state


@every
def test_parity_with_its_own_forward(name: str) -> None:
    model, ids = wrapped(name), torch.randint(VOCAB, (2, T))
    with torch.no_grad():
        want = model.hf(ids).logits
        assert_parity("hf", f"transformers {type(model.hf).__name__}", model(ids).logits, want)
        assert_close("last", model(ids, logits="last").logits, want[:, -1:], 1e-5)
    assert model.vocab == VOCAB and model.dim == 16 and len(model.blocks) == 2


@main
def test_generation_is_that_of_transformers(name: str) -> None:
    model, ids = wrapped(name), torch.randint(VOCAB, (2, 7))
    want = model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.cat([ids, greedy(model, ids, 12)], 1), want)


@torch.no_grad()
def greedy(model: Model, ids: Tensor, steps: int) -> Tensor:
    out, written = model(ids), []
    for _ in range(steps):
        written.append(out.logits[:, -1].argmax(-1))
        out = model(written[-1][:, None], out.state)
    return torch.stack(written, 1)


@every
@pytest.mark.parametrize("where", [[1, 2, 9, 20], list(range(1, T))], ids=["pieces", "tokens"])
def test_any_cut(name: str, where: list[int]) -> None:
    model, ids = wrapped(name), torch.randint(VOCAB, (2, T))
    with torch.no_grad():
        want, end = run(model, [ids])
        got, state = run(model, list(pieces(ids, where)))
    assert_close("outputs", got, want, 1e-5)
    assert_states_close("end", state, end, 1e-5)
    assert state.seen.tolist() == [T] * 2 and state.tokens == T


@every
def test_a_batch_is_its_rows(name: str) -> None:
    model, ids = wrapped(name), torch.randint(VOCAB, (3, 12))
    with torch.no_grad():
        out = model(ids)
        for row in range(3):
            alone = model(ids[row : row + 1])
            assert_close(f"row {row}", out.logits[row : row + 1], alone.logits, 1e-5)
            assert_states_close(f"row {row}", out.state.rows([row]), alone.state, 1e-5)


@pytest.mark.parametrize("name", [*MAIN, *MORE, "llama:eager"])
@pytest.mark.parametrize("seed", range(3))
def test_padding_and_packing(name: str, seed: int) -> None:
    """Four calls with padding and resets anywhere, one row empty at first: document by document, what the real tokens give alone."""
    model = CausalLM(make("llama", attn_implementation="eager")) if name == "llama:eager" else wrapped(name)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (3, T), generator=random)
    valid, reset = torch.rand(3, T, generator=random) < 0.7, torch.rand(3, T, generator=random) < 0.15
    valid[1, :9], valid[:, 25:] = False, True
    reset &= valid
    reset[:, 25:] = False
    state, outputs = None, []
    with torch.no_grad():
        for a, b in ((0, 9), (9, 10), (10, 25), (25, T)):
            out = model(ids[:, a:b], state, Span(valid[:, a:b], reset[:, a:b]) if b < T else None)
            state = out.state
            outputs.append(out.logits)
        got = torch.cat(outputs, 1)
        for row in range(3):
            real = valid[row].nonzero()[:, 0]
            starts = [i for i, t in enumerate(real.tolist()) if i == 0 or reset[row, t]]
            for start, stop in zip(starts, [*starts[1:], len(real)]):
                part = real[start:stop]
                alone = model(ids[row : row + 1, part])
                assert_close("document", got[row : row + 1, part], alone.logits, 1e-5)
            assert state.seen[row] == len(real) - starts[-1]


@every
def test_a_call_of_padding_alone_changes_nothing(name: str) -> None:
    model, ids = wrapped(name), torch.randint(VOCAB, (2, 6))
    nothing = Span(torch.zeros(2, 6, dtype=torch.bool))
    with torch.no_grad():
        state = model(ids).state
        later = model(ids[:, :3], model(ids, state, nothing).state)
        assert_close("after padding", later.logits, model(ids[:, :3], state).logits, 1e-5)
        fresh = model(ids, model(ids, None, nothing).state)
        assert_close("after padding alone", fresh.logits, model(ids).logits, 1e-5)


@every
def test_save_load_fork_rewind(name: str, tmp_path: Path) -> None:
    model, ids = wrapped(name), torch.randint(VOCAB, (2, T))
    with torch.no_grad():
        state = model(ids[:, :21]).state
        want = model(ids[:, 21:], state)
        state.save(tmp_path / "state")
        model.save(tmp_path / "model")
        held, again = State.load(tmp_path / "state"), rm.load(tmp_path / "model")
        assert held.digest() == state.digest() and again.config == model.config and type(again) is CausalLM
        got = again(ids[:, 21:], held)
        assert torch.equal(got.logits, want.logits) and got.state.digest() == want.state.digest()
        fork = model(ids[:, :3], state)  # a fork that goes another way, and the first one again
        assert torch.equal(model(ids[:, 21:], state).logits, want.logits) and fork.state.tokens == 24
        twice = model(ids[[0, 0], 21:], state.rows([0, 0]))
        assert_close("one row twice", twice.logits, want.logits[[0, 0]], 1e-5)


@every
@pytest.mark.parametrize("where", [[1, 7, 8, 20]])
def test_gradients_through_the_state_are_those_of_the_whole(name: str, where: list[int]) -> None:
    """To 1e-9 in float64 where transformers computes in it (LayerNorm, no rotation in float32); else to what float32 gives."""
    exact = name in ("gpt2", "opt")
    model, ids = CausalLM(make(name)).eval(), torch.randint(VOCAB, (2, T))
    model = model.double() if exact else model
    grads = []
    for parts in ([ids], list(pieces(ids, where))):
        model.zero_grad()
        logits, _ = run(model, parts)
        (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert_gradients_close(name, grads[1], grads[0], 1e-9 if exact else 2e-4)


def test_no_gradient_is_kept_where_none_is_asked_for() -> None:
    model, ids = wrapped("llama"), torch.randint(VOCAB, (1, 40))
    with torch.no_grad():
        state = model(ids[:, :20]).state
        for token in ids[:, 20:].split(1, 1):
            stores = {id(layer.keys._store) for layer in state.layers}
            state = model(token, state).state
        assert stores == {id(layer.keys._store) for layer in state.layers}  # appended in place: nothing was copied
    assert not any(tensor.requires_grad for tensor in state.tensors())


@main
@pytest.mark.parametrize(("slug", "hyper"), [("rmt", {}), ("armt", {"key_dim": 8})])
def test_memories_go_around(name: str, slug: str, hyper: dict[str, int], tmp_path: Path) -> None:
    """Three segments and a half: a stream of tokens, ragged rows, save and load in mid-segment."""
    memory, ids = around(slug, name, **hyper), torch.randint(VOCAB, (2, 28))
    with torch.no_grad():
        want, end = run(memory, [ids])
        got, state = run(memory, list(ids.split(1, 1)))
        assert_close("tokens", got, want, 1e-5)
        assert_states_close("tokens", state, end, 1e-5)
        span = Span.from_lengths([28, 13], 28)
        ragged = memory(ids, None, span)
        assert_close("ragged", ragged.logits[1:, :13], memory(ids[1:, :13]).logits, 1e-5)
        later = memory(ids[:, :15], ragged.state)
        alone = memory(torch.cat([ids[1:, :13], ids[1:, :15]], 1))
        assert_close("later", later.logits[1:], alone.logits[:, 13:], 1e-5)
        state = memory(ids[:, :21]).state
        memory.save(tmp_path / "model")
        state.save(tmp_path / "state")
        again = rm.load(tmp_path / "model")(ids[:, 21:], State.load(tmp_path / "state"))
        assert torch.equal(again.logits, memory(ids[:, 21:], state).logits)


def around(slug: str, name: str, **hyper: Any) -> Model:
    memory = rm.memory(slug, backbone=make(name), segment=8, tokens=2, **hyper)
    assert isinstance(memory.backbone, CausalLM)
    with torch.no_grad():
        for key, weight in memory.named_parameters():
            if not key.startswith("backbone."):
                weight.add_(0.2 * torch.randn_like(weight))
    return memory.eval()


@main
@pytest.mark.parametrize(("slug", "hyper"), [("rmt", {}), ("armt", {"key_dim": 8})])
def test_gradients_through_a_memory(name: str, slug: str, hyper: dict[str, int]) -> None:
    memory, ids = around(slug, name, **hyper), torch.randint(VOCAB, (2, 24))
    memory = memory.double() if name == "gpt2" else memory
    grads = []
    for parts in ([ids], list(pieces(ids, [3, 8, 20]))):
        memory.zero_grad()
        logits, _ = run(memory, parts)
        logits[:, 16:].square().sum().backward()  # of the third segment alone: what the first two get came through the memory
        grads.append({key: p.grad for key, p in memory.named_parameters() if p.grad is not None})
    assert bool(grads[0]["prompt"].any())
    assert_gradients_close(name, grads[1], grads[0], 1e-9 if name == "gpt2" else 5e-4)  # fp32: quotients of sums, three segments deep


def test_hooks_see_every_layer() -> None:
    model, ids = wrapped("gpt2"), torch.randint(VOCAB, (1, 5))
    seen: list[tuple[str, int]] = []

    def note(word: str, index: int, h: Tensor) -> Tensor:
        seen.append((word, index))
        return h

    with torch.no_grad():
        hidden, _ = model.encode(model.embed(ids), None, None, functools.partial(note, "before"), functools.partial(note, "after"))
        assert seen == [("before", 0), ("after", 0), ("before", 1), ("after", 1)]
        assert torch.equal(hidden, model(ids).hidden)
        moved, _ = model.encode(model.embed(ids), None, None, after=lambda index, h: h + 1.0 * index * torch.randn_like(h))
    assert not torch.allclose(moved, hidden)
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_a_forward_that_fails_leaves_the_model_as_it_was() -> None:
    model, ids = wrapped("llama"), torch.randint(VOCAB, (1, 5))

    def fail(index: int, h: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.encode(model.embed(ids), None, None, before=fail)
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_it_reads_a_stream_in_a_session(tmp_path: Path) -> None:
    from remanence.tokenizers import ByteTokenizer

    tokenizer = ByteTokenizer()
    model = CausalLM(make("llama", vocab_size=tokenizer.vocab_size, max_position_embeddings=512)).eval()
    session = rm.Session(model, tokenizer).read("It was the best of times, ").read("it was the worst of times.")
    kept = session.fork()
    text = session.generate(" It was", max_new=8)
    session.save(tmp_path / "state")
    assert rm.Session.load(tmp_path / "state", model, tokenizer).state.digest() == session.state.digest()
    assert kept.generate(" It was", max_new=8) == text
    assert session.rewind(20).tokens == 20


def test_from_pretrained_and_save_pretrained(tmp_path: Path) -> None:
    model, ids = wrapped("qwen3"), torch.randint(VOCAB, (1, 6))
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert not again.training and torch.equal(again(ids).logits, model(ids).logits)
    assert again.header == model.header  # states may go from one to the other


def test_bfloat16_survives_saving(tmp_path: Path) -> None:
    model, ids = CausalLM(make("llama").to(torch.bfloat16)).eval(), torch.randint(VOCAB, (2, 9))
    model.save(tmp_path)
    again = rm.load(tmp_path)
    with torch.no_grad():
        out = again(ids)
        assert out.logits.dtype == torch.bfloat16 and torch.equal(out.logits, model(ids).logits)
        assert_close("cut", run(again, list(pieces(ids, [4])))[0].float(), out.logits.float(), 2e-2)


def test_what_cannot_be_held_is_refused() -> None:
    ids = torch.randint(VOCAB, (2, 6))
    ragged = Span.from_lengths([6, 3], 6)
    for name, own, message in (
        ("rwkv", {"attention_hidden_size": 16}, "keeps its state in no cache of transformers"),
        ("falcon_h1", {}, "LinearAttentionAndFullAttentionLayer, which is none of the caches"),
        ("nemotron_h", {"num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "mamba_num_heads": 4,
                        "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1}, "limits its time step"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' rotary positions"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            CausalLM(make(name, **own))
    bloom = CausalLM(make("bloom"))
    with torch.no_grad():
        whole = bloom(ids).logits
        assert_close("bloom, in step", run(bloom, list(pieces(ids, [2, 3])))[0], whole, 1e-5)
        with pytest.raises(UsageError, match="bloom.* cannot be masked from outside"):
            bloom(ids, bloom(ids, span=ragged).state)
    checkpointing = CausalLM(make("llama")).train()
    checkpointing.hf.activation_checkpointing_enable()
    with pytest.raises(UsageError, match="checkpoints its gradients, which drops the cache"):
        checkpointing(ids)
    gpt2 = wrapped("gpt2")
    with pytest.raises(UsageError, match="has 64 positions and was given token 65 of a text; put a segment memory"):
        gpt2(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(UsageError, match="backbone is a CausalLM; transformer-xl works between the layers of a Decoder"):
        rm.memory("transformer-xl", backbone=make("llama"))
    with pytest.raises(UsageError, match="hf_model is a Linear"):
        CausalLM(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="LlamaModel .* has no language-modelling head"):
        CausalLM(make("llama").model)
    with pytest.raises(StateError, match="made by a hf of configuration"):
        wrapped("llama")(ids, wrapped("qwen3")(ids).state)
    with pytest.raises(UsageError, match="has no NeverForCausalLM"):
        CausalLM.build({"architecture": "NeverForCausalLM", "config": {}})


def test_a_layer_that_ignores_its_cache_is_refused() -> None:
    model = make("recurrent_gemma", num_hidden_layers=3, attention_window_size=5, lru_width=16)
    with pytest.raises(UsageError, match="did not use the cache"):
        CausalLM(model)(torch.zeros(1, 3, dtype=torch.long))


def ours(kind: str, tie: bool = True) -> Model:
    torch.manual_seed(0)
    model: Model = Decoder(ModelConfig(vocab=VOCAB, dim=16, layers="gated-deltanet, attention", ffn=1, tie=tie))
    if kind != "decoder":
        model = rm.memory(kind, backbone=model, segment=8, tokens=2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


@pytest.mark.parametrize(("kind", "tie"), [("decoder", True), ("decoder", False), ("rmt", True)])
def test_a_model_as_one_of_transformers(kind: str, tie: bool, tmp_path: Path) -> None:
    model, ids = ours(kind, tie), torch.randint(VOCAB, (2, 11))
    theirs, mask = to_hf(model), torch.ones(2, 11, dtype=torch.long)
    got = theirs.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(got, torch.cat([ids, greedy(model, ids, 12)], 1))
    slow = theirs.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(slow, got)
    theirs.save_pretrained(tmp_path)
    for again in (transformers.AutoModelForCausalLM.from_pretrained(tmp_path), type(theirs).from_pretrained(tmp_path)):
        assert type(again) is register().RemanenceForCausalLM and again.model.config == model.config
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert len(list(again.parameters())) == len(list(model.parameters()))  # what was tied is tied


def test_generation_with_padding_beams_and_a_state_from_before() -> None:
    model, ids = ours("rmt"), torch.randint(1, VOCAB, (2, 11))
    theirs, mask = to_hf(model), torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    got = theirs.generate(ids, attention_mask=mask, **options)
    assert torch.equal(got[1, 11:], greedy(model, ids[1:, 4:], 6)[0])
    best = theirs.generate(ids[:1], attention_mask=mask[:1], num_beams=4, **options)
    score = [theirs(x).logits.log_softmax(-1)[0, 10:-1].gather(-1, x[0, 11:, None]).sum() for x in (best, got[:1])]
    assert score[0] >= score[1] - 1e-5
    with torch.no_grad():
        state = model(ids[:1]).state
        cache = register().RemanenceCache(state)
        out = theirs(ids[:1, :5], past_key_values=cache)
        assert_close("continued", out.logits, model(ids[:1, :5], state).logits, 1e-6)
        assert cache.state is out.past_key_values.state and cache.state.tokens == 16 and state.tokens == 11


def test_loss_and_refusals_of_the_hf_side() -> None:
    model, ids = ours("decoder"), torch.randint(VOCAB, (2, 9))
    theirs = to_hf(model)
    out = theirs(ids, labels=ids)
    assert_close("loss", out.loss, model(ids[:, :-1], targets=ids[:, 1:]).loss, 1e-6)
    assert theirs(ids, logits_to_keep=2).logits.shape == (2, 2, VOCAB)
    assert theirs(ids, use_cache=False).past_key_values is None
    for given, message in (
        ({"position_ids": ids}, "position_ids cannot be given to a decoder"),
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values is a DynamicCache"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask has shape \[2, 3\]"),
    ):
        with pytest.raises(UsageError, match=message):
            theirs(ids, **given)
    with pytest.raises(UsageError, match="cannot be cropped"):
        theirs(ids).past_key_values.crop(-1)
    with pytest.raises(UsageError, match="is a Model of this library already"):
        rm.memory("rmt", backbone=theirs)
