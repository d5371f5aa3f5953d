"""The pool of pages that holds the closed entries of a layer.

A page holds `page_size` entries of one (request, kv head) of one layer; `core.pages` says how.
All pages of a layer lie in one tensor, so that growing never copies more than one layer.

Legend: D key dim, Dv value dim, P pages of the pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachefold.core.pages import key_view, value_view

PAGE_SIZES = (16, 32)

# A full pool grows by what is needed and 1 / SPARE of itself. Growing copies the pool: at 1 / 64
# that is rarer than once in 64 tokens at long contexts, and the spare pages cost at most 1.6 %.
SPARE = 64


def check_page_size(page_size: int) -> None:
    """Refuses a page size that kernels are not made for.

    Raises:
        ValueError: neither 16 nor 32 entries.
    """
    if page_size not in PAGE_SIZES:
        raise ValueError(
            f"page_size must be one of {PAGE_SIZES} entries, got {page_size}; 16 wastes less "
            "memory, 32 makes shorter block tables"
        )


class Pool:
    """Pages of any kind in one tensor; which of them are free is known on the host.

    Args:
        page_size: entries per page.
        width: numbers per page.
        dtype: of these numbers.
        device: where the pages are.

    >>> pool = Pool(32, 2560, torch.uint8, "cpu")
    >>> pages = pool.take(3)
    >>> pool.give_back(pages[:1])
    >>> pool.num_pages, pool.num_free, pool.nbytes(), pool.used_nbytes()
    (3, 1, 7680, 5120)
    """

    def __init__(
        self, page_size: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.page_size = page_size
        # Entries are written to it in place, in whatever mode that happens.
        with torch.inference_mode(False):
            self.data = torch.empty(0, width, dtype=dtype, device=device)
        """(P, width); garbage where no entry was written."""
        self.free: list[int] = []
        """Pages without an owner; the last is taken first."""

    @property
    def num_pages(self) -> int:
        """P, free pages included."""
        return self.data.shape[0]

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self.free)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return self.data.shape[1] * self.data.element_size()

    def nbytes(self) -> int:
        """Bytes of the pool, free pages included."""
        return self.data.untyped_storage().nbytes()

    def used_nbytes(self) -> int:
        """Bytes of the pages that have an owner."""
        return (self.num_pages - self.num_free) * self.page_nbytes

    def take(self, count: int, spare_nbytes: int | None = None) -> Tensor:
        """Gives out pages, free ones first; grows the pool when they run out.

        Args:
            count: pages.
            spare_nbytes: most bytes that growth may take beyond `count` pages; None = no bound.

        Returns:
            (count,) int32, the pages; what they hold is garbage.
        """
        spare = self.num_pages // SPARE
        if spare_nbytes is not None:
            spare = min(spare, spare_nbytes // self.page_nbytes)
        if count > self.num_free:
            self.reserve(count + spare)
        start = self.num_free - count
        taken, self.free = self.free[start:][::-1], self.free[:start]
        return torch.tensor(taken, dtype=torch.int32, device=self.data.device)

    def give_back(self, pages: Tensor) -> None:
        """Frees pages, (n,) integers."""
        self.free = self.free + pages.tolist()

    def reserve(self, count: int) -> None:
        """Grows the pool so far that `count` pages are free."""
        missing = count - self.num_free
        if missing <= 0:
            return
        old = self.data
        num_pages = len(old) + missing
        with torch.inference_mode(False):
            data = old.new_empty(num_pages, old.shape[1])
            data[: len(old)] = old
        self.data = data
        # Reversed: the lowest page is taken first.
        self.free = list(range(num_pages - 1, len(old) - 1, -1)) + self.free

    def keep(self, pages: Tensor) -> None:
        """Shrinks the pool to `pages`, (n,) integers, which become the pages 0 to n - 1."""
        with torch.inference_mode(False):
            self.data = self.data.index_select(0, pages)
        self.free = []

    def rewind(self, num_pages: int, free: list[int]) -> None:
        """Takes back growth: the first `num_pages` pages stay, those in `free` without owner."""
        if num_pages < self.num_pages:
            with torch.inference_mode(False):
                self.data = self.data[:num_pages].clone()
        self.free = free


class PagePool(Pool):
    """Pages of entries as attention reads them: (P, page_size * (D + Dv)), see `core.pages`.

    Args:
        page_size: entries per page, 16 or 32.
        key_dim: D.
        value_dim: Dv.
        dtype: of the entries.
        device: where the pages are.

    >>> pool = PagePool(16, 64, 64, torch.bfloat16, "cpu")
    >>> pool.take(3).tolist(), pool.nbytes(), pool.keys.shape
    ([0, 1, 2], 12288, torch.Size([3, 64, 16]))
    """

    def __init__(
        self,
        page_size: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        check_page_size(page_size)
        super().__init__(page_size, page_size * (key_dim + value_dim), dtype, device)
        self.key_dim, self.value_dim = key_dim, value_dim

    @property
    def keys(self) -> Tensor:
        """(P, D, page_size) view; writing to it writes to the pool."""
        return key_view(self.data, self.page_size, self.key_dim)

    @property
    def values(self) -> Tensor:
        """(P, page_size, Dv) view; writing to it writes to the pool."""
        return value_view(self.data, self.page_size, self.key_dim)
