"""Attention of Vision Longformer (2103.15358): over all tokens, or over those of the chunks around a token.

Both have learnt biases for every pair of tokens, by how far one is from the other, and global tokens, which attend to
all and to which all attend. Where a map is so small that all pairs are hardly more than those that are wanted, sparse
attention is a full one with a mask.

parity: the biases of a full attention belong to the map of its construction. For another number of tokens the matrix
of all pairs is resized as if it were a picture (EsViT models/layers/full_attention.py).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.blocks import attend
from models.swin import relative_position_index
from utils import to_device

AROUND = 9  # chunks: a token's own and its eight neighbours, row by row
OWN = 4
# mode 1 draws one of 8 neighbours, counted row by row without the chunk itself
NEIGHBOURS = tuple(chunk for chunk in range(AROUND) if chunk != OWN)


# ---------------------------------------------------------------------------------------------------------------------
# Biases and masks
# ---------------------------------------------------------------------------------------------------------------------


def chunk_position_index(window: int) -> torch.Tensor:
    """Row of the bias table for a token of a chunk and one of the nine chunks around: (window^2, 9 * window^2) int64.

    Chunk by chunk, and row by row in each. Files have this table; here it is only kept.
    """
    own = torch.arange(window**2)
    chunk = torch.arange(AROUND).repeat_interleave(window**2)
    place = own.repeat(AROUND)
    rows = (own // window)[:, None] - (place // window + (chunk // 3 - 1) * window)
    columns = (own % window)[:, None] - (place % window + (chunk % 3 - 1) * window)
    return (rows + 2 * window - 1) * (4 * window - 1) + columns + 2 * window - 1


def relative_bias(table: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bias of every pair of tokens of a map: ``table`` ((2 r - 1)^2, heads) -> (heads, tokens, tokens).

    Element (p, q) is that of the offset p - q; of offsets beyond the table it is 0. Views and one copy: an index would
    be as large as the bias, and its gradient in no fixed order.
    """
    reach = (math.isqrt(table.shape[0]) + 1) // 2
    square = table.t().reshape(-1, 2 * reach - 1, 2 * reach - 1)
    (top, left) = (side - reach for side in size)
    square = F.pad(square, (left, left, top, top)) if top or left else square
    windows = square.unfold(1, size[0], 1).unfold(2, size[1], 1)  # (heads, -q, -q, p, p)
    return windows.flip(1, 2).permute(0, 3, 4, 1, 2).reshape(-1, size[0] * size[1], size[0] * size[1])


def chunk_bias(table: torch.Tensor, window: int) -> torch.Tensor:
    """``chunk_position_index`` looked up: ((4 window - 1)^2, heads) -> (heads, window^2, 9, window^2)."""
    square = table.t().reshape(-1, 4 * window - 1, 4 * window - 1)
    windows = square.unfold(1, window, 1).unfold(2, window, 1).flip(1, 2)  # (heads, key, key, query, query)
    windows = windows.unflatten(2, (3, window)).unflatten(1, (3, window))
    return windows.permute(0, 5, 6, 1, 3, 2, 4).reshape(-1, window**2, AROUND, window**2)


def resizing_matrix(old: int, new: int) -> torch.Tensor:
    """The bicubic resize of a line as the linear map it is: (new, old), float64.

    A product has a deterministic gradient on every device; the gradient of ``interpolate`` has not.
    """
    units = torch.eye(old, dtype=torch.float64).view(1, old, old, 1)
    return F.interpolate(units, size=(new, 1), mode="bicubic", align_corners=False)[0, :, :, 0].t().contiguous()


def barred(allowed: torch.Tensor) -> torch.Tensor:
    """bool -> 0 where allowed, minus infinity elsewhere."""
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)


def chunk_mask(size: tuple[int, int], window: int) -> torch.Tensor:
    """Bars what is outside of the map: (chunks, 9, window^2) for every chunk and the tokens of those around it."""
    counts = [-(-side // window) for side in size]
    inside = torch.zeros([(count + 2) * window for count in counts], dtype=torch.bool)
    inside[window : window + size[0], window : window + size[1]] = True
    around = inside.view(counts[0] + 2, window, counts[1] + 2, window).unfold(0, 3, 1).unfold(2, 3, 1)
    return barred(around.permute(0, 2, 4, 5, 1, 3).reshape(-1, AROUND, window**2))


def map_mask(size: tuple[int, int], window: int, own_only: bool) -> torch.Tensor:
    """Bars tokens of chunks that are not next to each other, or with ``own_only`` not the same: (tokens, tokens)."""
    rows, columns = (torch.arange(side) // window for side in size)
    chunks = torch.cartesian_prod(rows, columns)
    return barred((chunks[:, None] - chunks[None]).abs().amax(dim=-1) <= (0 if own_only else 1))


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """What both kinds share: tables of biases, and tables that follow from sizes, made once for each.

    Tokens are [global tokens | map row by row], (batch, tokens, dim); ``size`` is that of the map.
    """

    def __init__(self, num_heads: int, global_tokens: int, reach: int):
        super().__init__()
        self.num_heads, self.global_tokens = num_heads, global_tokens
        self.local_relative_position_bias_table = nn.Parameter(torch.zeros((2 * reach - 1) ** 2, num_heads))
        if global_tokens:
            self.g2l_relative_position_bias = nn.Parameter(torch.zeros(2, num_heads, global_tokens))
            self.g2g_relative_position_bias = nn.Parameter(torch.zeros(num_heads, global_tokens, global_tokens))
        self._made: dict[tuple, torch.Tensor] = {}

    def init_tables(self) -> None:
        nn.init.trunc_normal_(self.local_relative_position_bias_table, std=0.02)
        if self.global_tokens:
            nn.init.trunc_normal_(self.g2l_relative_position_bias, std=0.02)
            nn.init.trunc_normal_(self.g2g_relative_position_bias, std=0.02)

    def _once(self, make, *key):
        """``make(*key)`` on the device, made once."""
        like = self.local_relative_position_bias_table
        key = (make, *key, like.device, like.dtype)
        if key not in self._made:
            self._made[key] = to_device(make(*key[1:-2]), like.device, like.dtype)
        return self._made[key]

    def _with_globals(self, local):
        """``local`` (heads, tokens, tokens) with the rows and columns of the global tokens."""
        if not self.global_tokens:
            return local
        left = self.g2l_relative_position_bias[1][:, None].expand(-1, local.shape[1], -1)
        return torch.cat((self._from_globals(local.shape[2]), torch.cat((left, local), dim=2)), dim=1)

    def _from_globals(self, tokens):
        """Bias of the global tokens' queries: (heads, global tokens, global tokens + tokens)."""
        to_local = self.g2l_relative_position_bias[0][..., None].expand(-1, -1, tokens)
        return torch.cat((self.g2g_relative_position_bias, to_local), dim=2)

    def _heads(self, rows, parts):
        """(batch, tokens, parts * dim) -> ``parts`` tensors (batch, heads, tokens, dim / heads)."""
        return rows.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def together(out: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, dim / heads) -> (batch, tokens, dim)."""
    return out.transpose(1, 2).flatten(2)


class FullAttention(Attention):
    """Every token attends to all; ``side``: of the map that the table belongs to."""

    def __init__(self, dim: int, num_heads: int, global_tokens: int, side: int):
        super().__init__(num_heads, global_tokens, side)
        self.side = side
        self.register_buffer("relative_position_index", relative_position_index(side))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, size: tuple[int, int], neighbour: int | None = None) -> torch.Tensor:
        q, k, v = self._heads(self.qkv(x), 3)
        return self.proj(together(attend(q, k, v, self._bias(size)[None].to(q.dtype))))

    def _bias(self, size):
        local, count = relative_bias(self.local_relative_position_bias_table, (self.side, self.side)), math.prod(size)
        if count != self.side**2:
            matrix = self._once(resizing_matrix, self.side**2, count)
            with torch.autocast(local.device.type, enabled=False):
                local = matrix @ local @ matrix.t()
        return self._with_globals(local)


class SparseAttention(Attention):
    """A token attends to the global tokens, and to its chunk and those around it; a global token to all.

    mode 0: all nine chunks; -1: its own; 1: its own and one neighbour, the same everywhere, where one is given.
    """

    def __init__(self, dim: int, num_heads: int, global_tokens: int, window: int, mode: int):
        super().__init__(num_heads, global_tokens, 2 * window)
        self.window, self.mode = window, mode
        self.register_buffer("relative_position_index", chunk_position_index(window))
        self.query = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if global_tokens:  # the same modules, which files name twice
            self.query_global, self.kv_global, self.proj_global = self.query, self.kv, self.proj

    def forward(self, x: torch.Tensor, size: tuple[int, int], neighbour: int | None = None) -> torch.Tensor:
        """``neighbour``: 1 to 8, in mode 1; left out, all are attended to."""
        (q,), (k, v) = self._heads(self.query(x), 1), self._heads(self.kv(x), 2)
        if neighbour is not None:
            first, second = sorted((OWN, NEIGHBOURS[neighbour - 1]))
            chunks = (first, second)
        else:
            chunks = (OWN,) if self.mode < 0 else tuple(range(AROUND))
        if neighbour is None and self._map_is_cheaper(size, len(chunks)):
            mask = self._once(map_mask, size, self.window, self.mode < 0)
            bias = self._with_globals(relative_bias(self.local_relative_position_bias_table, size) + mask)
            out = attend(q, k, v, bias[None].to(q.dtype))
        else:
            out = self._by_chunks(q, k, v, size, chunks)
        return self.proj(together(out))

    def _map_is_cheaper(self, size, chunks):
        """Whether all pairs of tokens are not many more than those that attend to each other, chunk by chunk."""
        tokens, padded = (math.prod(-(-side // w) * w for side in size) for w in (1, self.window))
        return tokens * tokens <= 2 * padded * chunks * self.window**2  # measured: cutting chunks has its price

    def _by_chunks(self, q, k, v, size, chunks):
        """``attend``, of every token to the global ones and to ``chunks`` of those around it."""
        g = self.global_tokens
        bias = chunk_bias(self.local_relative_position_bias_table, self.window)
        mask = self._once(chunk_mask, size, self.window)
        bias, mask = (torch.cat([part[..., c, :] for c in chunks], dim=-1) for part in (bias, mask))
        bias = bias[:, None] + mask[:, None]  # (heads, chunks, window^2, keys)
        queries = self._around(self._cut(q, size), size, (OWN,))
        keys, values = (self._around(self._cut(part, size), size, chunks) for part in (k, v))
        if g:
            count = bias.shape[1]
            bias = torch.cat(
                (self.g2l_relative_position_bias[1][:, None, None].expand(-1, *bias.shape[1:3], -1), bias), -1
            )
            keys, values = (
                torch.cat((whole[:, :, None, :g].expand(-1, -1, count, -1, -1).flatten(1, 2), part), dim=2)
                for whole, part in ((k, keys), (v, values))
            )
        out = self._join(attend(queries, keys, values, bias.flatten(0, 1)[None].to(q.dtype)), size)
        if not g:
            return out
        return torch.cat((attend(q[:, :, :g], k, v, self._from_globals(out.shape[2])[None].to(q.dtype)), out), dim=2)

    def _cut(self, part, size):
        """Local tokens and a chunk of zeros around: (batch, heads, chunk rows, window, chunk columns, window, dim)."""
        w, (height, width) = self.window, size
        local = part[:, :, self.global_tokens :].unflatten(2, size)
        local = F.pad(local, (0, 0, w, w + -width % w, w, w + -height % w))
        return local.unflatten(3, (-1, w)).unflatten(2, (-1, w))

    def _around(self, cut, size, chunks):
        """Of every chunk those of ``chunks`` around it: (batch, heads * chunks, len(chunks) * window^2, dim)."""
        rows, columns = (-(-side // self.window) for side in size)
        parts = [cut[:, :, c // 3 : c // 3 + rows, :, c % 3 : c % 3 + columns] for c in chunks]
        stacked = torch.stack(parts, dim=4) if len(parts) > 1 else parts[0].unsqueeze(4)
        # (batch, heads, rows, window, chunks, columns, window, dim)
        return stacked.permute(0, 1, 2, 5, 4, 3, 6, 7).flatten(4, 6).flatten(1, 3)

    def _join(self, out, size):
        """(batch, heads * chunks, window^2, dim) -> local tokens (batch, heads, tokens, dim)."""
        w, (height, width) = self.window, size
        out = out.unflatten(2, (w, w)).unflatten(1, (self.num_heads, -(-height // w), -(-width // w)))
        out = out.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return out[:, :, :height, :width].flatten(2, 3)
