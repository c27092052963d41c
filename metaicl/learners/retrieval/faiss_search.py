"""Indexes of faiss behind the few methods that a memory bank needs; faiss is imported when one is built."""

import math
from typing import Any

import torch
from torch import Tensor

_GRAPH_DEGREE = 32
_ROWS_PER_CELL = 39  # what the clustering of faiss asks for at least


class FaissIndex:
    """An inner-product index that follows a bank: new, changed and removed items without a new build.

    A changed or removed item stays in the index as a dead entry, and its new key is appended; when dead entries
    outnumber living ones, `worn` says so and the owner builds afresh.

    Args:
        kind: "faiss-flat" (exact), "faiss-ivf" (cells of k-means), "faiss-hnsw" (a graph).
        keys: (M, K).
        breadth: How much an approximate index looks at: cells of IVF, candidates of HNSW.

    Raises:
        ImportError: If faiss is not installed.
    """

    def __init__(self, kind: str, keys: Tensor, *, breadth: int) -> None:
        """Build the index."""
        try:
            import faiss
        except ImportError as error:
            raise ImportError(f'the backend {kind!r} needs faiss: pip install "metaicl[retrieval]"') from error
        n_items, size = keys.shape
        self.breadth, self.kind = breadth, kind
        self.index: Any
        if kind == "faiss-hnsw":
            self.index = faiss.IndexHNSWFlat(size, _GRAPH_DEGREE, faiss.METRIC_INNER_PRODUCT)
        elif kind == "faiss-ivf":
            n_cells = max(1, min(int(4 * math.sqrt(n_items)), n_items // _ROWS_PER_CELL))
            self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, n_cells, faiss.METRIC_INNER_PRODUCT)
            self.index.own_fields = False
            self._quantizer = self.index.quantizer  # faiss does not keep it alive
            self.index.cp.min_points_per_centroid = 1  # a bank may be small; faiss would warn on stderr
            self.index.train(_as_numpy(keys))
            self.index.nprobe = min(breadth, n_cells)
        else:
            self.index = faiss.IndexFlatIP(size)
        self.item = torch.empty(0, dtype=torch.long)  # of each entry, -1 = dead
        self.append(keys)

    @property
    def worn(self) -> bool:
        """Whether most entries are dead."""
        return int((self.item < 0).sum()) > len(self.item) // 2

    def append(self, keys: Tensor) -> None:
        """Add the keys (m, K) of new items, numbered on."""
        start = int(self.item.max()) + 1 if len(self.item) else 0
        self._append(keys, torch.arange(start, start + len(keys)))

    def refresh(self, items: Tensor, keys: Tensor) -> None:
        """Give items, long (m,), new keys (m, K)."""
        items = items.cpu()
        self.item[torch.isin(self.item, items)] = -1
        self._append(keys, items)

    def remove(self, keep: Tensor) -> None:
        """Drop the items that bool (M,) does not keep, and number the others anew."""
        number = (keep.cumsum(0) - 1).masked_fill(~keep, -1).cpu()
        self.item = torch.where(self.item >= 0, number[self.item.clamp(min=0)], -1)

    def search(self, queries: Tensor, n: int) -> Tensor:
        """Items of the n entries (fewer where there are fewer) that look best to each query (Q, K): long (Q, n).

        -1 stands for a dead entry and for nothing.
        """
        n = min(n, len(self.item))
        if self.kind == "faiss-hnsw":
            self.index.hnsw.efSearch = max(self.breadth, 2 * n)
        _, entry = self.index.search(_as_numpy(queries), n)
        entry = torch.from_numpy(entry)
        return torch.where(entry >= 0, self.item[entry.clamp(min=0)], -1).to(queries.device)

    def _append(self, keys: Tensor, items: Tensor) -> None:
        self.index.add(_as_numpy(keys))
        self.item = torch.cat([self.item, items])


def _as_numpy(rows: Tensor) -> Any:
    return rows.detach().cpu().float().contiguous().numpy()
