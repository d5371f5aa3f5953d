"""How a page is laid out: `page_size` entries of one (request, kv head), keys first, then values.

Keys lie channel by channel, so that one load takes the same channel of 16 entries and the scores
of a page need no sum across lanes; values lie entry by entry.

Legend: P pages, D key dim, Dv value dim, B batch, K kv heads, S entries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def key_view(pages: Tensor, page_size: int, key_dim: int) -> Tensor:
    """(P, page_size * (D + Dv)) -> (P, D, page_size); writing to it writes to the pages.

    >>> pages = torch.arange(6.0).view(1, 6)
    >>> key_view(pages, 2, 2).tolist()
    [[[0.0, 1.0], [2.0, 3.0]]]
    """
    return pages.narrow(1, 0, page_size * key_dim).unflatten(1, (key_dim, page_size))


def value_view(pages: Tensor, page_size: int, key_dim: int) -> Tensor:
    """(P, page_size * (D + Dv)) -> (P, page_size, Dv); writing to it writes to the pages.

    >>> value_view(torch.arange(6.0).view(1, 6), 2, 2).tolist()
    [[[4.0], [5.0]]]
    """
    start = page_size * key_dim
    return pages.narrow(1, start, pages.shape[1] - start).unflatten(
        1, (page_size, (pages.shape[1] - start) // page_size)
    )


def gather(pages: Tensor, page_size: int, key_dim: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """Copies the entries out of the pages, for plain torch.

    Args:
        pages: (P, page_size * (D + Dv)).
        page_size: entries per page.
        key_dim: D.
        table: (B, K, C) int32, the pages of each head in order, then -1.

    Returns:
        Keys (B, K, S, D) and values (B, K, S, Dv), S = C * page_size; garbage where no entry is.

    >>> pages = torch.arange(6.0).view(1, 6)
    >>> key, value = gather(pages, 2, 2, torch.zeros(1, 1, 1, dtype=torch.int32))
    >>> key.tolist(), value.tolist()
    ([[[[0.0, 2.0], [1.0, 3.0]]]], [[[[4.0], [5.0]]]])
    """
    batch, heads, columns = table.shape
    # Over flat rows, which index_select copies faster than pages of rows.
    picked = pages.index_select(0, table.clamp(min=0).flatten())
    key = key_view(picked, page_size, key_dim).view(batch, heads, columns, key_dim, page_size)
    value = value_view(picked, page_size, key_dim)
    return (
        key.transpose(3, 4).reshape(batch, heads, columns * page_size, key_dim),
        value.reshape(batch, heads, columns * page_size, value.shape[-1]),
    )


def slots(lengths: Tensor, columns: int, page_size: int) -> Tensor:
    """(B, K) entries -> (B, K, columns * page_size) bool, True where an entry exists.

    >>> slots(torch.tensor([[1]]), 1, 2).tolist()
    [[[True, False]]]
    """
    return torch.arange(columns * page_size, device=lengths.device) < lengths[..., None]
