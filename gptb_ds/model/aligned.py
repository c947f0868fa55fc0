"""Products with a matrix whose number of outputs suits a GPU badly, such as a head over 50,257 tokens.

Where the outputs are no multiple of 8, cuBLAS multiplies 16-bit numbers in kernels that read them one by one: on an
H200 at 117 TFLOP/s instead of 500 or more. The matrix is given rows of zeros for the product, not for good; what comes
of them is cut off, and so results are those of the plain product.

Axes: R rows, I inputs, O outputs, P outputs with those that were added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

MULTIPLE = 64
# For a smaller matrix the launches that this takes cost more than they bring.
LEAST_OUTPUTS = 4096
DEVICES = ("cuda",)


def missing_outputs(matrix_OI: torch.Tensor) -> int:
    """How many outputs to add for the product; 0 where it makes no difference."""
    if matrix_OI.device.type not in DEVICES or len(matrix_OI) < LEAST_OUTPUTS:
        return 0
    return -len(matrix_OI) % MULTIPLE


def with_rows(matrix_OI: torch.Tensor, missing: int) -> torch.Tensor:
    """The matrix with so many rows of zeros behind its own, (P, I)."""
    return F.pad(matrix_OI, (0, 0, 0, missing)) if missing else matrix_OI


def with_columns(rows_RO: torch.Tensor, missing: int) -> torch.Tensor:
    """These rows with so many zeros behind each, (R, P)."""
    return F.pad(rows_RO, (0, missing)) if missing else rows_RO
