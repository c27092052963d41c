"""The memory bank's search beside faiss, on the same keys: times, recall and memory.

`python search.py N_ROWS` prints the memory that a bank and its searches hold, in MiB (Linux).
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from metaicl.learners.retrieval.bank import MemoryBank
from metaicl.peak_memory import read_peak, start_peak

N_QUERIES, SIZE, K = 256, 128, 10
CLUSTERS = 1000


def search_times(n_rows: int, *, repeats: int) -> dict[str, float]:
    """Median seconds of 256 queries (K = 128, k = 10) in turns, with torch's number of threads for both.

    Args:
        n_rows: Items of the bank.
        repeats: Turns after one to warm up.

    Raises:
        RuntimeError: If the two do not find the same, but for ties within rounding.
    """
    keys, queries = gaussian_rows(n_rows), gaussian_rows(N_QUERIES, seed=1)
    faiss.omp_set_num_threads(torch.get_num_threads())
    flat: Any = faiss.IndexFlatIP(SIZE)
    flat.add(keys.numpy())
    bank = filled(keys)
    found, (score, _) = bank.search(queries, K), flat.search(queries.numpy(), K)
    if not np.allclose(found.score.numpy(), score, rtol=1e-4, atol=1e-4):
        raise RuntimeError(f"the exact searches of {n_rows} rows differ")
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: bank.search(queries, K),
        "faiss flat": lambda: flat.search(queries.numpy(), K),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    return {name: float(np.median(values)) for name, values in seconds.items()}


def approximate_recall(n_rows: int) -> dict[str, float]:
    """Recall@10, seconds of the build and seconds of 256 queries of IVF and HNSW, on clustered keys.

    Recall is the share of the 10 best items, by exact search, that the index finds.
    """
    faiss.omp_set_num_threads(torch.get_num_threads())
    keys, queries = clustered_rows(n_rows), clustered_rows(N_QUERIES, seed=1)
    exact = filled(keys).search(queries, K).index
    found: dict[str, float] = {}
    for backend in ("faiss-ivf", "faiss-hnsw"):
        bank = filled(keys, backend=backend)
        first = timed(lambda bank=bank: bank.search(queries, K))
        index = bank.search(queries, K).index
        search = float(np.median([timed(lambda bank=bank: bank.search(queries, K)) for _ in range(5)]))
        recall = float((exact[:, :, None] == index[:, None]).any(2).double().mean())
        found |= {f"{backend} recall@{K}": recall}
        found |= {f"{backend} build seconds": max(first - search, 0.0), f"{backend} search seconds": search}
    return found


def search_memory(n_rows: int) -> dict[str, float]:
    """MiB that a bank holds, and that a search holds beyond it at the worst moment, in this process (Linux)."""
    device = torch.device("cpu")
    empty = start_peak(device)
    bank = filled(gaussian_rows(n_rows))
    bank.search(gaussian_rows(N_QUERIES, seed=1)[:1], K)
    held = start_peak(device)
    bank.search(gaussian_rows(N_QUERIES, seed=1), K)
    search = read_peak(device, held)
    if empty is None or held is None or search is None:
        raise RuntimeError("this system does not tell a process its peak memory")
    return {"bank": (held - empty) / 2**20, "search": search / 2**20}


def filled(keys: Tensor, *, backend: str = "exact") -> MemoryBank:
    """A bank of keys and row numbers."""
    bank = MemoryBank(backend=backend)
    bank.add(keys, {}, rows=torch.arange(len(keys)))
    return bank


def gaussian_rows(n_rows: int, *, seed: int = 0) -> Tensor:
    """Rows (n_rows, 128) without structure, the worst case of every index."""
    return torch.randn(n_rows, SIZE, generator=torch.Generator().manual_seed(seed))


def clustered_rows(n_rows: int, *, seed: int = 0) -> Tensor:
    """Unit rows (n_rows, 128) around the same 1,000 centers whatever the seed, like embeddings of classes."""
    centers = torch.randn(CLUSTERS, SIZE, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(CLUSTERS, (n_rows,), generator=generator)
    rows = centers[own] + 0.7 * torch.randn(n_rows, SIZE, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1)


def timed(way: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part, mebibytes in search_memory(int(sys.argv[1])).items():
        print(f"{part}: {mebibytes:.0f} MiB")
