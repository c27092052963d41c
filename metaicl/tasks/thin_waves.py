"""Cells of the plane of waves u = (a cos p, a sin p) where a prior, uniform in a and p, leaves a thin part of it.

A grid over the plane has no point in a thin ring or wedge. Here the narrow one of a and p is cut into a few slices, and
in each of them the other one into cells, over the part that the rows leave open.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

Range = tuple[float, float]

_SLICES, _ARC, _RAY = 12, 32, 128  # of the narrow one, and cells in each: of a quarter of a circle, of a radius
_SIGNS = ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))  # of the four quarters, along the two axes
_TURNS = ((0.0, 1.0), (math.pi, -1.0), (math.pi, 1.0), (0.0, -1.0))  # angle = base + turn * that in the first quarter


class Window(NamedTuple):
    """What the rows leave open: a box along the axes of the likelihood's precision.

    Attributes:
        axes: Orthonormal columns (B, 2, 2).
        low: Least coordinates (B, 2) along them.
        high: Largest coordinates (B, 2).
    """

    axes: Tensor
    low: Tensor
    high: Tensor


class ThinCells(NamedTuple):
    """Middle (B, S, 2) of each cell, logarithm (B, S) of its prior weight, and covariance (B, S, 2, 2) within it."""

    waves: Tensor
    log_prior: Tensor
    cell: Tensor


def thinnest(amplitude: Range, phase: Range) -> float:
    """The smaller width of the prior in the plane of waves: across the ring, or across the wedge at its widest."""
    return min(amplitude[1] - amplitude[0], (phase[1] - phase[0]) * max(map(abs, amplitude)))


def thin_cells(window: Window, amplitude: Range, phase: Range) -> ThinCells:
    """Cells over the part of the prior that lies in the window; those outside have the weight 0."""
    ring = amplitude[1] - amplitude[0] == thinnest(amplitude, phase)
    a, p = _arcs(window, amplitude, phase) if ring else _rays(window, amplitude, phase)  # (B, ..., 2, 2), of corners
    a, p = a.flatten(1, -3), p.flatten(1, -3)
    corners = _waves(a, p)
    across, along = (corners[..., 1, :, :] - corners[..., 0, :, :]).mean(-2), corners.diff(dim=-2).mean((-3, -2))
    sides = [(one.diff(dim=-2).mean((-2, -1)), one.diff(dim=-1).mean((-2, -1))) for one in (a, p)]
    area = (sides[0][0] * sides[1][1] - sides[0][1] * sides[1][0]).abs()
    cell = (across[..., None] * across[..., None, :] + along[..., None] * along[..., None, :]) / 12
    return ThinCells(_waves(a.mean((-2, -1)), p.mean((-2, -1))), area.log(), cell)


def _waves(a: Tensor, p: Tensor) -> Tensor:
    return torch.stack([a * p.cos(), a * p.sin()], -1)


def _slices(bounds: Range, count: int, like: Tensor) -> Tensor:
    """Both ends (count, 2) of equal slices of a range."""
    edges = torch.linspace(*bounds, count + 1, dtype=like.dtype, device=like.device)
    return torch.stack([edges[:-1], edges[1:]], -1)


def _cut(first: Tensor, last: Tensor, count: int) -> Tensor:
    """Corners (..., count, 2, 2) of equal cells between the ends `first` and `last` (..., 2) of a slice's two sides."""
    steps = torch.linspace(0, 1, count + 1, dtype=first.dtype, device=first.device)
    edges = first[..., None] + (last - first)[..., None] * steps  # (..., 2, count + 1)
    return torch.stack([edges[..., :-1], edges[..., 1:]], -1).transpose(-3, -2)


def _arcs(window: Window, amplitude: Range, phase: Range) -> tuple[Tensor, Tensor]:
    """Corners in a and p of cells along the ring: in each slice of a and quarter of the circle one arc is open."""
    like = window.low
    slices = _slices(amplitude, _SLICES, like)  # (A, 2)
    sign = torch.where(slices.sum(-1, keepdim=True) < 0, -1.0, 1.0)
    length = (sign * slices).clamp(min=1e-12)
    ends = torch.stack([window.low, window.high], -1)[:, None] * torch.tensor(_SIGNS).to(like)[..., None]
    sizes = ends.clamp(min=0).sort(-1).values[:, :, None, None]  # (B, 4, 1, 1, 2 axes, 2 ends)
    share = (sizes / length[..., None, None]).clamp(max=1)  # (B, 4, A, 2, 2, 2)
    first = torch.maximum(share[..., 1, 0].asin(), share[..., 0, 1].acos())
    last = torch.maximum(first, torch.minimum(share[..., 1, 1].asin(), share[..., 0, 0].acos()))
    base, turn = torch.tensor(_TURNS).to(like).T[..., None, None, None]  # (4, 1, 1, 1)
    flip = torch.linalg.det(window.axes).sign()[:, None, None, None, None]
    rotation = torch.atan2(window.axes[:, 1, 0], window.axes[:, 0, 0])[:, None, None, None, None]
    half_turn = torch.where(sign < 0, math.pi, 0.0)[..., None]  # a negative amplitude is half a turn
    # A range of p beyond one turn and a quarter less is cut, so that a quarter lies in each piece at most once.
    pieces = _slices(phase, math.ceil((phase[1] - phase[0]) / (1.5 * math.pi)), like)[:, None, None, None]
    middle = rotation + flip * (base + turn * math.pi / 4) - half_turn  # (B, 4, A, 1, 1)
    turns = ((pieces.mean(-1, keepdim=True) - middle[:, None]) / math.tau).round() * math.tau
    p = rotation + flip * (base + turn * torch.stack([first, last], -1)) - half_turn  # (B, 4, A, 2, 2)
    p = (p[:, None] + turns).clamp(pieces[..., :1], pieces[..., 1:])
    p = _cut(p[..., 0], p[..., 1], _ARC)  # (B, M, 4, A, cells, 2, 2)
    return slices[:, None, :, None].expand_as(p), p


def _rays(window: Window, amplitude: Range, phase: Range) -> tuple[Tensor, Tensor]:
    """Corners in a and p of cells along the wedge: in each slice of p the open amplitudes are one interval."""
    slices = _slices(phase, _SLICES, window.low)  # (P, 2)
    along = _waves(torch.ones_like(slices), slices) @ window.axes[:, None]  # (B, P, 2, 2 axes)
    along = torch.where(along.abs() < 1e-12, 1e-12, along)
    ends = torch.stack([window.low, window.high], -1)[:, None, None] / along[..., None]
    ends = ends.sort(-1).values.clamp(*amplitude)  # (B, P, 2, 2 axes, 2 ends)
    first = ends[..., 0].amax(-1)
    a = _cut(first, torch.maximum(first, ends[..., 1].amin(-1)), _RAY)  # (B, P, cells, 2, 2)
    return a, slices[:, None, :, None].expand_as(a)
