"""Tensors kept as float16: with a power of two beside them, or as orthonormal directions.

float16 has three decimal digits. A power of two, which divides the numbers exactly, puts the
largest of them at the top of its range, so that numbers 2²⁹ times smaller keep as many.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOAT16 = torch.float16
TOP = 15  # float16 ends just below 2¹⁶
SCALE = "scale"
ROUNDED = 0.05  # how far inner products of directions may be from those of orthonormal ones


def rounded(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a tensor as float16 under its name, and its power of two under ``name.scale``.

    Args:
        name: A name.
        tensor: Finite numbers. What has two bytes a number already is kept as it is.
    """
    if tensor.dtype.itemsize <= FLOAT16.itemsize:
        return {name: tensor}
    largest = tensor.abs().max().double()
    exponent = torch.frexp(largest).exponent - TOP  # of zeros: minus the top, which does no harm
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return {name: (tensor / scale.to(tensor.dtype)).to(FLOAT16), f"{name}.{SCALE}": scale}


def widened(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """Return a tensor that may have been `rounded`.

    Args:
        tensors: Named tensors.
        name: The tensor's name.
        dtype: Of the result, if it was rounded.

    Raises:
        KeyError: If there is no such tensor.
        ValueError: If its scale is no positive number, or is that of a tensor of another dtype.
    """
    tensor, scale = tensors[name], tensors.get(f"{name}.{SCALE}")
    if scale is None:
        return tensor
    if scale.shape != () or not bool(scale > 0):
        raise ValueError(f"the scale of {name!r} is not a positive number")
    if tensor.dtype != FLOAT16:
        raise ValueError(f"{name!r} has a scale, and is {tensor.dtype}, not {FLOAT16}")
    return tensor.to(dtype) * scale.to(dtype)


def in_working_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return packed tensors for work in a dtype, whichever they were computed in.

    Traces are kept in float64 by all, and directions that were rounded are widened where they are
    unpacked.

    Args:
        tensors: Named tensors.
        dtype: float32 or float64.
    """

    def wanted(name: str, tensor: Tensor) -> torch.dtype:
        if name.endswith("trace"):
            return torch.float64
        return FLOAT16 if name.endswith("vectors") and tensor.dtype == FLOAT16 else dtype

    return {name: tensor.to(wanted(name, tensor)) for name, tensor in tensors.items()}


def orthonormal(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the orthonormal directions nearest to ones that were rounded to float16.

    Two of Newton's steps for the polar factor: the error of ``Uᵀ U`` is squared twice.

    Args:
        vectors: Shape ``(d, k)``.
        dtype: Of the result.

    Raises:
        ValueError: If the columns are not orthonormal up to rounding.
    """
    check_orthonormal(vectors)
    wide = vectors.double()
    eye = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
    for _ in range(2):
        wide = wide @ (1.5 * eye - 0.5 * wide.T @ wide)
    return wide.to(dtype).contiguous()


def check_orthonormal(vectors: Tensor) -> None:
    """Refuse directions that are not orthonormal, up to the rounding of any dtype.

    Args:
        vectors: Shape ``(d, k)``.

    Raises:
        ValueError: If they are not.
    """
    gram = vectors.double().T @ vectors.double()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if bool(((gram - eye).abs() > ROUNDED).any()):
        raise ValueError("directions are not orthonormal")
