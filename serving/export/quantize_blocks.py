"""Weight-only int8 and int4: a scale for every block of a row's weights, computed by com.microsoft.MatMulNBits.

Its numbers are unsigned: a weight is (number - zero point) * scale. In 8 bits the zero point is the middle; in 4 bits
each block has its own, and its scale is searched for. Shape letters: N outputs and K inputs of a linear layer, G blocks
of a row, B weights of a block.
"""

import functools
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from serving.export.linear import Linear

BLOCK = {8: 32, 4: 16}
INT8_ACTIVATIONS = 4  # accuracy_level: what is multiplied is rounded too, block by block, for the fastest kernels
SMALLEST = np.float32(1e-30)  # of a scale: a block of zeros is divided by it
SHRINK = np.linspace(0.7, 1.05, 15, dtype=np.float32)  # of the scale that spans all weights of a block
CHUNK = 1 << 20  # weights that are looked at together

Fit = tuple[np.ndarray, np.ndarray]  # scales and zero points [N, G]


def blocks(linear: Linear, bits: int) -> None:
    """Replace the layer by MatMulNBits over its weight in blocks of 8- or 4-bit numbers."""
    block, num_outputs = BLOCK[bits], linear.num_outputs
    num_blocks = -(-linear.num_inputs // block)
    fitted, name = _Fitted(linear, bits), f"int{bits}"
    inputs = [
        linear.rows,
        linear.constant(name, (num_outputs, num_blocks, block * bits // 8), ir.DataType.UINT8, fitted.weight),
        linear.constant(f"{name}.scales", (num_outputs, num_blocks), ir.DataType.FLOAT, fitted.scales),
    ]
    if bits == 4:
        shape = (num_outputs, -(-num_blocks // 2))
        inputs.append(linear.constant(f"{name}.zeros", shape, ir.DataType.UINT8, fitted.zeros))
    settings = {"K": linear.num_inputs, "N": num_outputs, "bits": bits, "block_size": block}
    settings["accuracy_level"] = INT8_ACTIVATIONS
    linear.replace([ir.node("MatMulNBits", inputs, settings, domain="com.microsoft")])


class _Fitted:
    """A weight's blocks. Scales and zero points are kept once found; the weight is read again when it is packed."""

    def __init__(self, linear: Linear, bits: int) -> None:
        self._linear, self._bits = linear, bits

    @functools.cached_property
    def _fit(self) -> Fit:
        find = {8: fit_middle, 4: fit_span}[self._bits]
        scales, zeros = zip(*(find(w_NGB, self._bits) for w_NGB in self._chunks(slice(None))), strict=True)
        return np.concatenate(scales), np.concatenate(zeros)

    def weight(self, rows: slice) -> np.ndarray:
        """Return rows of the packed weight, uint8 [N, G, B * bits / 8]."""
        found, first = [], 0
        scales_NG, zeros_NG = (each[rows] for each in self._fit)
        for w_NGB in self._chunks(rows):
            some = slice(first, first + len(w_NGB))
            found.append(pack(numbers(w_NGB, scales_NG[some], zeros_NG[some], self._bits), self._bits))
            first += len(w_NGB)
        return np.concatenate(found)

    def scales(self, rows: slice) -> np.ndarray:
        """Return rows of the scales [N, G]."""
        return self._fit[0][rows]

    def zeros(self, rows: slice) -> np.ndarray:
        """Return rows of the packed zero points."""
        return pack(self._fit[1][rows].astype(np.uint8), self._bits)

    def _chunks(self, rows: slice) -> Iterator[np.ndarray]:
        matrix_NK = self._linear.matrix_NK()[rows]
        num_rows = max(1, CHUNK // matrix_NK.shape[1])
        for first in range(0, len(matrix_NK), num_rows):
            yield in_blocks(matrix_NK[first : first + num_rows], BLOCK[self._bits])


def in_blocks(matrix_NK: np.ndarray, block: int) -> np.ndarray:
    """Return the matrix as [N, G, B], each row's last block filled up with zeros."""
    num_outputs, num_inputs = matrix_NK.shape
    return np.pad(matrix_NK, ((0, 0), (0, -num_inputs % block))).reshape(num_outputs, -1, block)


def numbers(w_NGB: np.ndarray, scales_NG: np.ndarray, zeros_NG: np.ndarray, bits: int) -> np.ndarray:
    """Return for each weight the number that comes closest to it under its block's scale and zero point."""
    found = np.round(w_NGB / scales_NG[..., None]) + zeros_NG[..., None]
    return np.clip(found, 0, 2**bits - 1).astype(np.uint8)


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Return 8-bit numbers as they are; of 4 bits two to a byte along the last axis, the earlier in the lower half."""
    if bits == 8:
        return numbers
    if numbers.shape[-1] % 2:
        numbers = np.concatenate([numbers, np.zeros_like(numbers[..., :1])], axis=-1)
    return numbers[..., ::2] | numbers[..., 1::2] << 4


def fit_middle(w_NGB: np.ndarray, bits: int) -> Fit:
    """Return the scales that reach the weight farthest from zero, and the middle as zero points."""
    middle = 2 ** (bits - 1)
    scales_NG = np.maximum(np.abs(w_NGB).max(axis=-1) / np.float32(middle - 1), SMALLEST)
    return scales_NG, np.full(scales_NG.shape, middle, np.float32)


def fit_span(w_NGB: np.ndarray, bits: int) -> Fit:
    """Return the scales and zero points that leave the least squared error of those tried.

    The first ones span all weights of a block, zero among them. Tried are zero points beside that one, and scales that
    cut the farthest weights and serve the others better; each scale is then improved by least squares.
    """
    top = 2**bits - 1
    low = np.minimum(w_NGB.min(axis=-1), 0)
    full = np.maximum((np.maximum(w_NGB.max(axis=-1), 0) - low) / np.float32(top), SMALLEST)
    zero = np.round(-low / full)
    best = full, zero
    least = np.full(full.shape, np.inf, np.float32)
    for shrink in SHRINK:
        for zeros in (np.clip(zero + offset, 0, top) for offset in (-1, 0, 1)):
            scales = _least_squares(w_NGB, full * shrink, zeros, bits)
            error = numbers(w_NGB, scales, zeros, bits) - zeros[..., None]
            error *= scales[..., None]
            error -= w_NGB
            errors = np.einsum("ngb,ngb->ng", error, error)
            better = errors < least
            best = np.where(better, scales, best[0]), np.where(better, zeros, best[1])
            least = np.minimum(errors, least)
    return best


def _least_squares(w_NGB: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> np.ndarray:
    """Return the scales that fit best to the numbers which these scales give."""
    levels = numbers(w_NGB, scales, zeros, bits) - zeros[..., None]
    squares = np.einsum("ngb,ngb->ng", levels, levels)
    found = np.einsum("ngb,ngb->ng", levels, w_NGB) / np.maximum(squares, 1)
    return np.where(found > SMALLEST, found, scales)
