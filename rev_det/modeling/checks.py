"""Checks of the arguments that Rev-ViT and Rev-MViT share."""

from __future__ import annotations

from typing import Any

from ..rules import check_count, check_pair, is_finite


def check_blocks(embed_dim: Any, depth: Any, num_heads: Any, mlp_ratio: Any, drop_path_rate: Any) -> None:
    """Check what describes the blocks.

    Raises:
        ValueError: an argument is no number of its kind, or outside of its range; the message names it.
    """
    check_count("embed_dim", embed_dim)
    check_count("depth", depth)
    check_count("num_heads", num_heads)
    if not is_finite(mlp_ratio) or int(embed_dim * mlp_ratio) < 1:
        raise ValueError(
            f"mlp_ratio must be a number that gives the MLPs a hidden width of at least 1; "
            f"got {mlp_ratio!r} times embed_dim {embed_dim}"
        )
    if not is_finite(drop_path_rate) or not 0.0 <= drop_path_rate < 1.0:
        raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {drop_path_rate!r}")


def check_patches(patch_kernel: Any, patch_stride: Any, patch_padding: Any, pretrain_img_size: Any) -> None:
    """Check that the patch embedding gives one token per stride, and pretraining images a square of them.

    Raises:
        ValueError: an argument is malformed, or they do not go together; the message names it.
    """
    check_pair("patch_kernel", patch_kernel)
    check_pair("patch_stride", patch_stride)
    check_pair("patch_padding", patch_padding, minimum=0)
    check_count("pretrain_img_size", pretrain_img_size)
    if patch_stride[0] != patch_stride[1]:
        raise ValueError(f"patch_stride must be the same in both directions, got {tuple(patch_stride)}")
    if pretrain_img_size % patch_stride[0]:
        raise ValueError(
            f"pretrain_img_size must be a multiple of the patch stride; got {pretrain_img_size} and "
            f"{patch_stride[0]}"
        )
    for kernel, stride, padding in zip(patch_kernel, patch_stride, patch_padding, strict=True):
        # Otherwise images of a whole number of strides would not have as many tokens.
        if not kernel - stride <= 2 * padding < kernel:
            raise ValueError(
                "patch_padding must be at least half of patch_kernel - patch_stride and below half of "
                f"patch_kernel; got padding {tuple(patch_padding)}, kernel {tuple(patch_kernel)} and stride "
                f"{tuple(patch_stride)}"
            )
