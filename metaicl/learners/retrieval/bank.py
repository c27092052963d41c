"""A memory of meta-training rows, grouped into what can be retrieved together."""

from typing import Any

import torch
from torch import Tensor, nn

from metaicl.checks import check_choice, check_count


class MemoryBank(nn.Module):
    """Groups of labeled rows and a search over their keys.

    A group is what one retrieval brings: the rows of one class in classification, of one task in regression.

    Args:
        backend: "exact" (chunked matrix product and top-k) or "faiss" (a flat inner-product index; extra `retrieval`).
        chunk: Groups compared at once by the exact search; bounds memory.
    """

    keys: Tensor
    x: Tensor
    y: Tensor
    ids: Tensor
    classes: Tensor

    def __init__(self, *, backend: str = "exact", chunk: int = 65_536) -> None:
        """Start empty; `fill` gives it rows."""
        super().__init__()
        self.backend = check_choice("backend", backend, ("exact", "faiss"))
        self.chunk = check_count("chunk", chunk)
        for name in ("keys", "x", "y"):
            self.register_buffer(name, torch.empty(0))
        for name in ("ids", "classes"):
            self.register_buffer(name, torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        """M, the number of groups."""
        return self.x.shape[0]

    def fill(self, *, keys: Tensor, x: Tensor, y: Tensor, ids: Tensor, classes: Tensor) -> None:
        """Replace the content.

        Args:
            keys: (M, K), what the search compares (inner product).
            x: (M, R, *x_shape), R rows per group.
            y: (M, R, y_dim) targets; empty for classification, where the group is the label.
            ids: long (M, R), source rows, -1 = none.
            classes: long (M,), the source class of each group, -1 = none.

        Raises:
            ValueError: If the leading sizes differ or there is nothing.
        """
        sizes = {name: value.shape[0] for name, value in (("keys", keys), ("x", x), ("ids", ids), ("classes", classes))}
        if len(set(sizes.values())) != 1 or keys.shape[0] == 0:
            raise ValueError(f"a bank needs the same positive number of groups everywhere; got {sizes}")
        self.keys, self.x, self.y, self.ids, self.classes = keys, x, y, ids, classes

    def search(self, queries: Tensor, k: int, *, forbidden: Tensor) -> tuple[Tensor, Tensor]:
        """The k groups with the largest inner product.

        Args:
            queries: (..., K).
            k: How many.
            forbidden: bool (..., M), groups that must not be found.

        Returns:
            Indices (..., k) and which of them are real (..., k): False where fewer than k groups are allowed.

        Raises:
            ValueError: If the bank is empty or has fewer than k groups.
        """
        if not len(self):
            raise ValueError("the memory bank is empty; call prepare(tasks, seed=...) first, as meta_train does")
        if check_count("k", k) > len(self):
            raise ValueError(f"k must be at most the bank's {len(self)} groups; got {k}")
        if self.backend == "faiss":
            return self._search_faiss(queries, k, forbidden)
        best = queries.new_full((*queries.shape[:-1], k), -torch.inf)
        index = torch.zeros_like(best, dtype=torch.long)
        for start in range(0, len(self), self.chunk):
            part = slice(start, start + self.chunk)
            scores = (queries @ self.keys[part].T).masked_fill(forbidden[..., part], -torch.inf)
            top, at = scores.topk(min(k, scores.shape[-1]), -1)
            best, order = torch.cat([best, top], -1).topk(k, -1)
            index = torch.cat([index, at + start], -1).gather(-1, order)
        return index, best.isfinite()

    def _search_faiss(self, queries: Tensor, k: int, forbidden: Tensor) -> tuple[Tensor, Tensor]:
        try:
            import faiss
        except ImportError as error:
            raise ImportError('the faiss backend needs: pip install "metaicl[retrieval]"') from error
        index = faiss.IndexFlatIP(self.keys.shape[1])
        index.add(self.keys.detach().cpu().float().numpy())  # type: ignore[call-arg]  # faiss patches its signature
        # Ask for as many more as may be forbidden, then keep the first k allowed ones.
        wanted = min(len(self), k + int(forbidden.sum(-1).max()))
        flat = queries.detach().reshape(-1, queries.shape[-1]).cpu().float().numpy()
        _, found = index.search(flat, wanted)  # type: ignore[call-arg]  # likewise
        at = torch.from_numpy(found).to(queries.device).reshape(*queries.shape[:-1], wanted)
        allowed = ~forbidden.expand(*queries.shape[:-1], -1).gather(-1, at)
        first = (~allowed).long().argsort(dim=-1, stable=True)[..., :k]
        return at.gather(-1, first), allowed.gather(-1, first)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The content's size is data, not architecture: take whatever size was saved.
        for name in ("keys", "x", "y", "ids", "classes"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                here = getattr(self, name)
                setattr(self, name, torch.empty_like(saved, device=here.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
