"""quantize by draws and dequantize. Bytes: values, codes and scales. No peer has these codes, the nearest is torch's
int8 of one scale a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.ops.harness import Case
from fastmoe import ops


def case(R: int, width: int) -> Case:
    x_RI = torch.randn(R, width)
    scale_R = x_RI.abs().amax(1) / 127
    zeros_R = torch.zeros(R, dtype=torch.int64)

    def peer():
        return [torch.quantize_per_channel(x_RI, scale_R, zeros_R, 0, torch.qint8).dequantize()]

    return Case(
        f"quantize + dequantize {R}x{width}",
        {"fastmoe": lambda: [ops.dequantize(*ops.quantize(x_RI, True, 7))], "torch int8 rows": peer},
        exact=lambda: [x_RI],
        work=R * width * (4 + 1 + 1 + 4) + 2 * 2 * R * -(-width // 32),
        roof="triad",
        tolerance=2 * 255 / (2 * 127**2),
    )


def cases(quick: bool) -> Iterator[Case]:
    for shape in [(64, 48)] if quick else [(4096, 4096), (1, 1 << 24), (1 << 18, 48)]:
        yield case(*shape)
