"""Weights in groups of 32 columns, each with a scale and perhaps a minimum: what quantized products read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

GROUP = 32  # columns that share a scale


@dataclass(frozen=True, slots=True)
class GroupQuantized:
    """A weight (rows, cols), cols a multiple of GROUP, as unsigned codes: `w = scale * code + minimum`.

    codes: (rows, cols) uint8, below 2 ** bits; scales: (rows, cols / GROUP) float16; minimums: as scales, or None for
    symmetric weights, whose minimum is `-scale * 2 ** (bits - 1)`.
    """

    bits: int  # 4 or 8; 8-bit weights are symmetric
    codes: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    @property
    def packed_bytes(self) -> int:
        """Bytes of these weights as kernels read them."""
        rows, cols = self.shape
        per_group = GROUP * self.bits // 8 + 2 * (1 if self.minimums is None else 2)
        return rows * (cols // GROUP) * per_group

    def rows(self, start: int, stop: int) -> GroupQuantized:
        """Some of the rows, as views."""
        minimums = None if self.minimums is None else self.minimums[start:stop]
        return GroupQuantized(self.bits, self.codes[start:stop], self.scales[start:stop], minimums)


def dequantize(weight: GroupQuantized) -> torch.Tensor:
    """The weight as float32: (rows, cols)."""
    rows, cols = weight.shape
    scales = weight.scales.float().unsqueeze(-1)
    codes = weight.codes.view(rows, cols // GROUP, GROUP).float()
    if weight.minimums is None:
        return (scales * (codes - (1 << weight.bits - 1))).view(rows, cols)
    return (scales * codes + weight.minimums.float().unsqueeze(-1)).view(rows, cols)


# Weights searched at a time: they stay in a core's cache, and torch, which splits larger operations than this, computes
# each on one thread. Barriers around operations this short cost a hundredfold beside a busy process.
_CHUNK = 1 << 15
REFINEMENTS = 2
# A group's extreme weight over the candidate scales. An integer beyond the codes clips the extreme a little, which pays
# where the others are far below it.
SYMMETRIC_DIVISORS = {
    4: (-8.0, 7.0, -7.4, -7.7, -8.3, -8.7, -9.2, -9.8, -10.6, -12.0, -6.5, 7.5, 8.3, 9.5),
    8: (127.0, -128.0, -127.5, -128.5, -130.0),
}
# A group's range over the candidate scales, with minimums.
SPAN_STEPS = (15.0, 14.0, 14.5, 15.4, 15.8, 16.3, 17.0, 18.0)


def quantize_groups(
    weight: torch.Tensor, bits: int, minimum: bool, importance: torch.Tensor | None = None
) -> GroupQuantized:
    """The codes, scales and minimums that come nearest to `weight` in the least squares.

    Scales are searched: for each of some candidates the codes are fixed by rounding, and the scale (and minimum) is
    then the weighted least-squares solution for these codes, as llama.cpp does it. What is compared is the error with
    scales as they are stored, in float16; it is never above that of rounding to the nearest with the extreme's scale.

    weight: (rows, cols) of a float type, cols a multiple of GROUP; bits: 4, or 8 without minimum; importance: (cols,),
    the weight of a column's squared error, such as the mean square of the input that meets it (AWQ's salience,
    arXiv:2306.00978); None is 1.
    Raises ValueError: another shape, values that are not finite, or so large that a float16 cannot scale them.
    """
    rows, cols = weight.shape
    if bits not in (4, 8) or (minimum and bits == 8):
        raise ValueError(f"{bits} bits {'with' if minimum else 'without'} minimum is unknown; known: 4, 8 without")
    if cols % GROUP:
        raise ValueError(f"{cols} columns are no multiple of {GROUP}")
    groups = cols // GROUP
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    scales = torch.empty(rows, groups, dtype=torch.float16)
    minimums = torch.empty_like(scales) if minimum else None
    salience = _salience(importance, cols)
    step = max(1, _CHUNK // cols)

    @torch.inference_mode()  # a mode is a thread's own: what the caller allocated in it is written to in it
    def search(start: int) -> None:
        part = weight[start : start + step].float()
        stop = start + len(part)
        # (GROUP, groups): sums over a group then run along the rows of memory.
        x = part.reshape(-1, GROUP).t().contiguous()
        w = None if salience is None else salience.repeat(1, len(part))
        found = _search_minimum(x, w) if minimum else _search_symmetric(x, w, bits)
        _check(x, found)
        codes[start:stop] = found.codes.t().reshape(-1, cols).to(torch.uint8)
        scales[start:stop] = found.scales.view(-1, groups)
        if minimums is not None:
            minimums[start:stop] = found.minimums.view(-1, groups)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(search, range(0, rows, step)):  # an error of one is raised here
            pass
    return GroupQuantized(bits, codes, scales, minimums)


def _salience(importance: torch.Tensor | None, cols: int) -> torch.Tensor | None:
    """(GROUP, groups); a column that was never met still counts a little."""
    if importance is None:
        return None
    if importance.shape != (cols,) or not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise ValueError(f"importance must be {cols} finite values, none below 0")
    mean = importance.float().mean()
    if mean == 0:
        return None
    return (importance.float() / mean).clamp_min(1e-4).view(-1, GROUP).t().contiguous()


@dataclass(slots=True)
class _Found:
    """Of groups as columns: codes (GROUP, groups) float32, unsigned; scales and minimums (groups,) in float16's values;
    error (groups,): the weighted squares.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor
    error: torch.Tensor


def _check(x: torch.Tensor, found: _Found) -> None:
    if not bool(torch.isfinite(found.error).all()):
        if not bool(torch.isfinite(x).all()):
            raise ValueError("not all of its values are finite")
        raise ValueError(f"its values, up to {float(x.abs().max()):g}, are too large for scales in float16")


def _half(values: torch.Tensor) -> torch.Tensor:
    """Rounded as they will be stored."""
    return values.half().float()


def _reciprocal(values: torch.Tensor) -> torch.Tensor:
    """1 / values, and 0 for 0: the codes of a group without range are then all alike."""
    return torch.where(values == 0, 0.0, values.reciprocal())


def _weighted(values: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    return values if w is None else values * w


def _search_symmetric(x: torch.Tensor, w: torch.Tensor | None, bits: int) -> _Found:
    half = 1 << bits - 1
    wx = _weighted(x, w)

    def codes_of(scales: torch.Tensor) -> torch.Tensor:
        return (x * _reciprocal(scales)).round_().clamp_(-half, half - 1)

    def solve(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best scale for these codes, and how much of the squares it explains."""
        product, square = (wx * codes).sum(0), _weighted(codes.square(), w).sum(0)
        scale = product * _reciprocal(square)
        return scale, scale * product

    def stored(scales: torch.Tensor) -> _Found:
        scales = _half(scales)
        codes = codes_of(scales)
        error = _weighted((x - scales * codes).square_(), w).sum(0)
        return _Found(codes.add_(half), scales, torch.zeros_like(scales), error)

    low, high = x.aminmax(dim=0)
    extreme = torch.where(high > -low, high, low)
    best, explained = solve(codes_of(extreme / SYMMETRIC_DIVISORS[bits][0]))
    for divisor in SYMMETRIC_DIVISORS[bits][1:]:
        scale, share = solve(codes_of(extreme / divisor))
        better = share > explained
        best, explained = torch.where(better, scale, best), torch.where(better, share, explained)
    for _ in range(REFINEMENTS):
        best, _ = solve(codes_of(best))
    return _best_of(stored(best), stored(extreme.abs() / (half - 1)), stored(extreme / -half))


def _search_minimum(x: torch.Tensor, w: torch.Tensor | None) -> _Found:
    total = float(GROUP) if w is None else w.sum(0)
    mean = _weighted(x, w).sum(0) / total
    centered = x - mean  # sums of squares would lose digits to the mean
    wx = _weighted(centered, w)

    def codes_of(scales: torch.Tensor, minimums: torch.Tensor) -> torch.Tensor:
        return ((centered - minimums) * _reciprocal(scales)).round_().clamp_(0, 15)

    def solve(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The best scale and (centered) minimum for these codes, and how much of the squares they explain."""
        weighted = _weighted(codes, w)
        linear, square, product = weighted.sum(0), (weighted * codes).sum(0), (wx * codes).sum(0)
        scale = total * product * _reciprocal(total * square - linear * linear)
        return scale, -scale * linear / total, scale * product

    def stored(scales: torch.Tensor, minimums: torch.Tensor) -> _Found:
        scales, minimums = _half(scales), _half(minimums)
        codes = ((x - minimums) * _reciprocal(scales)).round_().clamp_(0, 15)
        error = _weighted((x - (scales * codes + minimums)).square_(), w).sum(0)
        return _Found(codes, scales, minimums, error)

    low, high = centered.aminmax(dim=0)
    span = high - low
    best, bottom, explained = solve(codes_of(span / SPAN_STEPS[0], low))
    for steps in SPAN_STEPS[1:]:
        scale, minimum, share = solve(codes_of(span / steps, low))
        better = share > explained
        best, explained = torch.where(better, scale, best), torch.where(better, share, explained)
        bottom = torch.where(better, minimum, bottom)
    for _ in range(REFINEMENTS):
        best, bottom, _ = solve(codes_of(best, bottom))
    return _best_of(stored(best, bottom + mean), stored(span / 15, low + mean))


def _best_of(first: _Found, *others: _Found) -> _Found:
    for other in others:
        better = other.error < first.error
        first = _Found(
            torch.where(better, other.codes, first.codes),
            torch.where(better, other.scales, first.scales),
            torch.where(better, other.minimums, first.minimums),
            torch.where(better, other.error, first.error),
        )
    return first
