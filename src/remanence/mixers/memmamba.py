"""MemMamba: a Mamba that takes notes of what seems important and looks them up when its state has forgotten (arXiv 2510.03279)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..ops.backend import accumulate_dtype
from ..span import Span, positions
from ..state import State
from .mamba import Mamba, MambaState


class MemMambaState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    mamba: MambaState
    pool: Tensor  # [B, S, M], the notes kept of the document's chunks before the open one
    priority: Tensor  # [B, S], in (0, 1); 0 where there is no note
    notes: Tensor  # [B, P, M], those of the open chunk, which may be full
    importance: Tensor  # [B, P], in (0, 1); 0 where there is no note


class Chunks:
    """The tokens of a call on a grid [B, G, P]: row 0 goes on with the open chunk, every later row is a chunk of one document.

    at [B, T]: positions in the document, whose multiples of P = period start a chunk. starts [B, G]: whether a row starts a document.
    """

    def __init__(self, at: Tensor, period: int, span: Span | None):
        self.period = period
        real = torch.ones_like(at, dtype=torch.bool) if span is None or span.valid is None else span.valid
        row = ((at % period == 0) & real).cumsum(1)  # [B, T]
        no_reset = span is None or span.reset is None
        self.rows = -(-at.shape[1] // period) + 1 if no_reset else int(row.max()) + 1
        self.cell = (row * period + at % period).masked_fill(~real, self.rows * period)  # one cell more, for the padding
        starts = torch.zeros(len(at), self.rows + 1, dtype=torch.bool, device=at.device)
        self.starts = starts.scatter(1, row.masked_fill((at > 0) | ~real, self.rows), True)[:, :-1]
        self.end = row[:, -1]

    def lay_out(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """[B, G, P, M] from the tokens' x [B, T, M] and what the open chunk has, before [B, P, M]; 0 where there is no token."""
        cells = x.new_zeros(len(x), self.rows * self.period + 1, x.shape[2])
        if before is not None:
            cells = torch.cat([before, cells[:, self.period :]], 1)
        cells = cells.scatter(1, self.cell[..., None].expand_as(x), x)
        return cells[:, :-1].unflatten(1, (self.rows, self.period))

    def tokens(self, x: Tensor) -> Tensor:
        """The inverse: [B, T, M] from [B, G, P, M]; 0 at padding."""
        x = F.pad(x.flatten(1, 2), (0, 0, 0, 1))
        return x.gather(1, self.cell[..., None].expand(-1, -1, x.shape[2]))

    def last(self, x: Tensor) -> Tensor:
        """What [B, G, ...] says of the chunk that is open at the end."""
        return x[torch.arange(len(x), device=x.device), self.end]


@system(
    "memmamba",
    kind="external-memory",
    paper="arXiv:2510.03279",
    year=2025,
    name="MemMamba",
    example={"slots": 6, "note_dim": 8, "period": 10, "state_size": 8},
    state="E N + 3 E + (S + P) (M + 1)",
    parity="an empty pool is Mamba, bit for bit; the pool against a loop over tokens",
    claim="Passkey retrieval at lengths where Mamba fails; flat perplexity on PG19 to 60 thousand tokens.",
)
class MemMamba(Mamba):
    """x [B, T, dim] -> y [B, T, dim]; the state is Mamba's, S = slots notes, and the notes of the open chunk of P = period tokens.

        s_t = sigmoid(MLP(x_t))      n_t = W_sum x_t, a note of M = note_dim numbers      o_t = Mamba(x)_t
        pool before chunk c of the document = the S notes of highest s among those of chunks 0 .. c - 1
        p_j = softmax_j(q_t . n_j / sqrt(M) + log s_j), with one more logit 0 whose value is 0      q_t = W_q x_t
        y_t = o_t + sigmoid(W_f o_t + b) W_r sum_j p_j n_j

    Our reading: the paper's public description names the parts (importance score, fixed pool that replaces its lowest priority, attention
    to it when the state has forgotten) and no code exists. Its two thresholds are soft here, so that they can be learned: a note weighs s_j
    in the attention, and the state's own read o_t opens the gate to the pool. The pool changes between chunks of the document's own
    positions, hence not with the way a stream is cut. W_r starts at 0: a fresh MemMamba is a Mamba. Attention to the notes of earlier
    layers is left out: a mixer sees one layer.
    """

    def __init__(
        self,
        dim: int,
        slots: int = 50,
        note_dim: int = 64,
        period: int = 64,
        expand: int = 2,
        state_size: int = 16,
        dt_rank: int | None = None,
        conv_width: int = 4,
        backend: str = "auto",
    ):
        super().__init__(dim, expand, state_size, dt_rank, conv_width, backend)
        self.slots, self.note_dim, self.period = slots, note_dim, period
        self.to_score, self.score = nn.Linear(dim, note_dim), nn.Linear(note_dim, 1)
        self.to_note, self.to_query = (nn.Linear(dim, note_dim, bias=False) for _ in range(2))
        self.forgotten = nn.Linear(dim, 1)
        self.recalled = nn.Linear(note_dim, dim, bias=False)
        nn.init.zeros_(self.recalled.weight)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, state: MemMambaState | None = None, span: Span | None = None
    ) -> tuple[Tensor, MemMambaState]:
        o, mamba = super().forward(x, state and state.mamba, span)
        state = state or self._fresh(x, mamba)
        at = positions(state.seen, x.shape[1], span)
        chunks = Chunks(at, self.period, span)
        full = accumulate_dtype(x)
        notes = chunks.lay_out(self.to_note(x).to(full), state.notes)
        importance = chunks.lay_out(self._importance(x), state.importance[..., None])[..., 0]
        pool, priority = self._pools(notes, importance, chunks, state)
        read = self._attend(chunks.lay_out(self.to_query(x).to(full)), pool, priority)
        y = o + self.forgotten(o).sigmoid() * self.recalled(chunks.tokens(read).to(x.dtype))
        pool, priority, notes, importance = (chunks.last(value) for value in (pool, priority, notes, importance))
        return y, MemMambaState(seen=at[:, -1] + 1, mamba=mamba, pool=pool, priority=priority, notes=notes, importance=importance)

    def _fresh(self, x: Tensor, mamba: MambaState) -> MemMambaState:
        def zeros(*sizes: int) -> Tensor:
            return x.new_zeros(len(x), *sizes, dtype=accumulate_dtype(x))

        return MemMambaState(
            seen=zeros().long(),
            mamba=mamba,
            pool=zeros(self.slots, self.note_dim),
            priority=zeros(self.slots),
            notes=zeros(self.period, self.note_dim),
            importance=zeros(self.period),
        )

    def _importance(self, x: Tensor) -> Tensor:
        """s [B, T, 1], in float32 at least: it decides which notes are kept, and a rounding to bfloat16 would change that."""
        full = accumulate_dtype(x)
        (W, b), (v, c) = ((layer.weight.to(full), layer.bias.to(full)) for layer in (self.to_score, self.score))
        return F.linear(F.silu(F.linear(x.to(full), W, b)), v, c).sigmoid()

    def _pools(self, notes: Tensor, importance: Tensor, chunks: Chunks, state: MemMambaState) -> tuple[Tensor, Tensor]:
        """The pool that every chunk reads, [B, G, S, M], and its priorities [B, G, S], from notes [B, G, P, M], importance [B, G, P]."""
        pools, priorities = [state.pool], [state.priority]
        for row in range(1, chunks.rows):
            priority, kept = torch.cat([priorities[-1], importance[:, row - 1]], 1).topk(self.slots, 1)
            pool = torch.cat([pools[-1], notes[:, row - 1]], 1).gather(1, kept[..., None].expand(-1, -1, self.note_dim))
            starts = chunks.starts[:, row, None]
            priorities.append(priority.masked_fill(starts, 0))
            pools.append(pool.masked_fill(starts[..., None], 0))
        return torch.stack(pools, 1), torch.stack(priorities, 1)

    def _attend(self, queries: Tensor, pool: Tensor, priority: Tensor) -> Tensor:
        """sum_j p_j n_j for queries [B, G, P, M]; 0 where the pool is empty."""
        logits = queries @ pool.mT * self.note_dim**-0.5 + priority.clamp(min=1e-30).log()[:, :, None]
        logits = logits.masked_fill((priority == 0)[:, :, None], -torch.inf)
        return F.pad(logits, (0, 1)).softmax(-1)[..., :-1] @ pool
