"""A product whose left side is batched by `vmap`, and whose right side is not repeated for it.

torch's own rule repeats the right side once per entry of the batch in memory. Beside tangents that
right side is all keys and values of a text, and the batch are the directions.
"""

from __future__ import annotations

from torch import Tensor, library


@library.custom_op("laplace_lora::stacked_matmul", mutates_args=())
def stacked_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``, ``(…, rows, columns)``.

    Args:
        left: ``(…, rows, d)``.
        right: ``(…, d, columns)``, with the same leading dimensions.
    """
    return left @ right


@stacked_matmul.register_fake
def _like(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


@stacked_matmul.register_vmap
def _batched(
    info: object, in_dims: tuple[int | None, int | None], left: Tensor, right: Tensor
) -> tuple[Tensor, int]:
    of_left, of_right = in_dims
    if of_left is None or of_right is not None:
        left = left if of_left is None else left.movedim(of_left, 0)
        right = right if of_right is None else right.movedim(of_right, 0)
        return left @ right, 0
    stacked = left.movedim(of_left, -3)  # (…, batch, rows, d)
    product = stacked.flatten(-3, -2) @ right
    return product.unflatten(-2, stacked.shape[-3:-1]), product.ndim - 2
