"""A linear layer with a plain weight, multiplied by torch's library.

The library chooses a kernel by the number of rows, and with it perhaps the bits; `row_counts.py`
says which numbers may be used. So a row gets the same bits with any other rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stateful_kv import ops
from stateful_kv.models.row_counts import REFERENCE, RowCounts, cancelling_inputs, probe

MAX_ROWS = 1024
# A CPU takes long for many rows, and computes few at a time.
MAX_CPU_ROWS = 128
_MAX_OUTPUTS = 1 << 25


@dataclass(frozen=True)
class DenseLinear:
    """y = x @ w.T + bias in the dtype of the weight, or silu(gate) * up of such a product.

    Attributes:
        weight: [out, K] float32, float16 or bfloat16; with `has_silu_mul` the rows of the gate
            come first.
        bias: [out] in the dtype of the weight, or None.
        rows: row counts of a product that give a row the same bits.
        has_silu_mul: the product holds gate and up; the result, silu(gate) * up, is half as wide.
    """

    weight: Tensor
    bias: Tensor | None
    rows: RowCounts
    has_silu_mul: bool = False

    @property
    def out_features(self) -> int:
        """Width of the result."""
        width = self.weight.shape[0]
        return width // 2 if self.has_silu_mul else width

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> Tensor:
        """Computes [N, out] from [N, K], both in the dtype of the weight.

        Args:
            x: the input.
            residual: [N, out] to add, or None.
            norm_weight: float32[K] where x is to be normalised first, or None.
            norm_eps: for that norm.
        """
        if norm_weight is not None:
            x = ops.rms_norm(x, norm_weight, norm_eps)
        y = self._product(x)
        if self.has_silu_mul:
            y = ops.silu_mul(y)
        return y if residual is None else y.add_(residual)

    def top_k(
        self, x: Tensor, k: int, norm_weight: Tensor, norm_eps: float
    ) -> tuple[Tensor, Tensor]:
        """The k largest of each row that a call would give.

        Args:
            x: [N, K], the input.
            k: from 1 to out.
            norm_weight: float32[K], x is normalised first.
            norm_eps: for that norm.

        Returns:
            ids: int64[N, k], largest first, of equals the lowest first, NaN before all.
            values: float32[N, k].
        """
        logits = self(x, norm_weight=norm_weight, norm_eps=norm_eps)
        if k == 1:
            ids, values = ops.argmax(logits)
            return ids[:, None], values[:, None]
        # Not torch.topk: it promises no order of equals.
        values, ids = torch.sort(logits.float(), dim=1, descending=True, stable=True)
        return ids[:, :k].contiguous(), values[:, :k].contiguous()

    def _product(self, x: Tensor) -> Tensor:
        """The product in blocks of allowed row counts; shapes alone decide, nothing is read."""
        num_rows = x.shape[0]
        blocks = self.rows.blocks(num_rows)
        if blocks == (num_rows,):
            return multiply(x, self.weight, self.bias)
        result = x.new_empty(sum(blocks), self.weight.shape[0])
        start = 0
        for count in blocks:
            rows = x[start : start + count]
            if rows.shape[0] < count:
                rows = torch.nn.functional.pad(rows, (0, 0, 0, count - rows.shape[0]))
            multiply(rows, self.weight, self.bias, result[start : start + count])
            start += count
        return result[:num_rows]


@dataclass
class RowCountTable:
    """The row counts of all weights of a model; weights of one shape are probed once.

    Attributes:
        max_rows: largest row count that is tried; None takes what suits the device.
    """

    max_rows: int | None = None
    _found: dict[tuple[object, ...], RowCounts] = field(default_factory=dict)

    def linear(
        self, weight: Tensor, bias: Tensor | None = None, *, has_silu_mul: bool = False
    ) -> DenseLinear:
        """Makes a layer of a weight [out, K] and a bias [out]."""
        key = (weight.shape, weight.dtype, weight.device, bias is None)
        if key not in self._found:
            self._found[key] = self._probe(weight, bias)
        return DenseLinear(weight, bias, self._found[key], has_silu_mul)

    def _probe(self, weight: Tensor, bias: Tensor | None) -> RowCounts:
        on_cpu = weight.device.type == "cpu"
        max_rows = self.max_rows or (MAX_CPU_ROWS if on_cpu else MAX_ROWS)
        # The head has many outputs: with fewer rows its probe needs less memory. It gets few rows
        # in a step anyway, since few want logits.
        max_rows = min(max_rows, max(REFERENCE, _MAX_OUTPUTS // weight.shape[0]))
        # The library looks at shapes, not at values, so another weight and no bias do.
        out_features, width = weight.shape
        samples, other = cancelling_inputs(2 * max_rows, out_features, width, weight.dtype)
        other = other.to(weight.device)
        zeros = None if bias is None else torch.zeros_like(bias)
        with torch.inference_mode():
            return probe(
                lambda x: multiply(x, other, zeros),
                [sample.to(weight.device) for sample in samples],
            )


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor | None = None
) -> Tensor:
    """Returns x @ weight.T + bias by the library; row counts are probed with this same call."""
    if bias is None:
        return torch.mm(x, weight.t(), out=output)
    return torch.addmm(bias, x, weight.t(), out=output)
