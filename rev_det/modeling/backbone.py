"""What RevViT and RevMViT share: patch and position embedding, drop path, initialisation, freezing."""

from __future__ import annotations

import torch
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.utils import PatchEmbed, get_abs_pos
from torch import Tensor, nn
from torch.nn import functional

from .fusion import ScaleNorm
from .layers import drop_path_masks
from .recompute import recompute
from .reversible import check_activations

TRANSITIONS = ("auto", "checkpoint", "cached")


class ReversibleBackbone(Backbone):
    """A Detectron2 backbone whose ``blocks`` work on two streams of tokens.

    Subclasses build ``blocks`` and call `finish`, which initialises and freezes.

    Args:
        patch_kernel, patch_stride, patch_padding: of the patch embedding's convolution.
        in_chans: channels of the images.
        embed_dim: width C of the first tokens.
        depth: number of blocks.
        drop_path_rate: probability of dropping a branch of the last block; it grows linearly from 0.
        pretrain_img_size: side in pixels of the square images that ``pos_embed`` has one entry per patch for;
            it is interpolated (bicubic) to any other grid.
        activations: "reversible", "cached" or "checkpoint", see `ReversibleSequence`.
        keep_attention: keep the fused attention's results instead of computing them again.

    Raises:
        ValueError: an argument outside the allowed values; the message names it.
    """

    def __init__(
        self,
        *,
        patch_kernel: tuple[int, int],
        patch_stride: tuple[int, int],
        patch_padding: tuple[int, int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        drop_path_rate: float,
        pretrain_img_size: int,
        activations: str,
        keep_attention: bool,
    ):
        super().__init__()
        check_activations(activations)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {drop_path_rate}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if pretrain_img_size < 1 or pretrain_img_size % patch_stride[0] or len(set(patch_stride)) > 1:
            raise ValueError(
                f"pretrain_img_size must be a multiple of the patch stride, and the stride the same in both "
                f"directions; got {pretrain_img_size} and {tuple(patch_stride)}"
            )
        self.activations = activations
        self.keep_attention = keep_attention
        self.patch_embed = PatchEmbed(patch_kernel, patch_stride, patch_padding, in_chans, embed_dim)
        grid = pretrain_img_size // patch_stride[0]
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, embed_dim))
        self.drop_path_rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]

    def finish(self, freeze_at: int) -> None:
        """Initialise all weights as the official models do, then freeze: 0 nothing, 1 the patch and position
        embeddings, 1 + k also the first k blocks."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_weights)
        if not 0 <= freeze_at <= 1 + len(self.blocks):
            raise ValueError(
                f"freeze_at must be 0 (nothing) to {1 + len(self.blocks)} (embeddings and all blocks), "
                f"got {freeze_at}"
            )
        if freeze_at:
            self.pos_embed.requires_grad_(False)
            self.patch_embed.requires_grad_(False)
            self.blocks[: freeze_at - 1].requires_grad_(False)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their position embedding. (B, in_chans, H, W) -> (B, H'*W', C), (H', W')."""
        x = self.patch_embed(images)  # (B, H', W', C)
        hw = (x.shape[1], x.shape[2])
        # The sum is in the position embedding's precision: float32 under autocast too.
        return (x + get_abs_pos(self.pos_embed, False, hw)).flatten(1, 2), hw

    def normalise(self, norm: ScaleNorm, x1: Tensor, x2: Tensor) -> Tensor:
        """The tokens of a scale from its two streams. 2 x (B, N, C) -> (B, N, 2C)."""
        if self.activations == "cached":
            return norm(x1, x2)
        return recompute(norm, x1, x2, chunks=norm.token_chunks(x1))

    def draw_masks(self, x: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
        """Drop-path multipliers (mF, mG) for every block and each sample of x; none in eval mode."""
        rates = self.drop_path_rates if self.training else [0.0] * len(self.drop_path_rates)
        return [drop_path_masks(rate, x) for rate in rates]


def pad_to_multiple(images: Tensor, size: int) -> Tensor:
    """Zeros on the right and at the bottom, up to the next multiple of ``size`` pixels. (B, C, H, W)."""
    height, width = images.shape[-2:]
    if height % size == 0 and width % size == 0:
        return images
    return functional.pad(images, (0, -width % size, 0, -height % size))


def to_feature_map(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), contiguous as other backbones return it."""
    return tokens.transpose(1, 2).unflatten(-1, hw).contiguous()


def _init_weights(module: nn.Module) -> None:
    # The biases of 0.02, LayerNorm's included, and torch's default for the patch embedding's bias are the
    # official models'.
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.constant_(module.bias, 0.02)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.constant_(module.bias, 0.02)
