"""Starting points of the scale searches, as data.

They were chosen one by one from fine grids: each is the point that lowered the mean error of the runs most,
given the points before it, on Gaussian and Student-t weights with and without importance. Then each was
replaced by a better one if there was one. The full range, (0, 0), is among the cuts, so that weights that lie
exactly on a grid are found exactly.
"""

from __future__ import annotations

Cuts = tuple[tuple[float, float], ...]

# fmt: off
CUTS: dict[int, Cuts] = {
    2: ((0, 0), (-0.3, 0.1), (0, 0.5), (0, 0.9), (0.1, -0.1), (0.2, 0.4), (0.3, -0.3), (0.3, 0.3), (0.4, 0.8),
        (0.5, 0.3), (0.6, 0.2), (0.8, 0.1), (1.1, 0.1)),
    4: ((0, 0), (-1, -1), (-0.3, -1), (-0.3, 0.3), (0, -1), (0, -0.3), (0, 0.3), (0, 0.6), (0, 1),
        (0.3, -1), (0.3, -0.3), (0.3, 0), (0.3, 0.3), (0.6, 0), (0.6, 0.6), (1, 0)),
    5: ((0, 0), (-2, -2), (-2, -1), (-2, -0.3), (-1, -1), (-1, 0), (-1, 0.3), (-0.3, -2), (-0.3, 0.3),
        (0, -0.3), (0, 0.3), (0, 1), (0.3, -1), (0.3, 0), (0.3, 0.3), (0.6, 0)),
}
"""Bits of a code -> steps by which the range is shortened below and above (`scale_search.fit_affine`)."""

PEAKS: dict[int, tuple[float, ...]] = {
    3: (-4.1, -5.4, -4.8, -4.4, -3.9, -3.65, -3.3, -3, 4.3),
    4: (-8, -10.8, -10, -9.4, -9, -8.6, -8.3, -7.7, -6.9, -6, 7.2, 8.5),
    5: (-16.05, -17.7, -16.8, -16.3, -15.8, -14.2, -13, 12, 13.9, 14.7, 15, 15.3),
    6: (-32.1, -33, -32.6, -31.7, -30.8, -29.4, -28, -27, -25.2, -23.8, -22.9, -22, 20.8, 26, 28.9, 30, 31.2),
    8: (-127, -127.3, -126.5, -126, -125, 127.2, 126.7, 126.3, 125.5, 124.5),
}
"""Bits of a code -> levels tried for the weight of largest magnitude (`scale_search.starting_scales`)."""
# fmt: on
