"""The base class of RevViT and RevMViT: embeddings, runs of reversible blocks, initialisation, freezing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.utils import PatchEmbed, get_abs_pos
from torch import Tensor, nn
from torch.nn import functional

from ..rules import check_count, is_whole
from .checks import check_blocks, check_patches
from .fusion import ScaleNorm
from .layers import drop_path_masks
from .recomputation import recompute
from .reversible import Masks, check_activations, run_blocks

TRANSITIONS = ("auto", "checkpoint", "cached")


@dataclass(frozen=True)
class Run:
    """One pass through the reversible blocks between two stage transitions.

    Attributes:
        first: number of the first block in the backbone.
        blocks: of the run.
        x: both streams before it, (B, N, C).
        y: the two streams after it.
        args: what every F was given besides its stream.
        masks: drop-path multipliers (mF, mG) of each block.
    """

    first: int
    blocks: tuple[nn.Module, ...]
    x: Tensor
    y: tuple[Tensor, Tensor]
    args: tuple
    masks: tuple[tuple[Tensor | None, Tensor | None], ...]


class MissingFeature(KeyError):
    """A head asks for a feature map that the backbone does not return: its name, and what to say."""

    def __str__(self) -> str:
        return self.args[1]


class FeatureShapes(dict[str, ShapeSpec]):
    """What ``output_shape()`` returns: Detectron2's heads look names up in it, and explain no failure."""

    def __missing__(self, name: str) -> ShapeSpec:
        raise MissingFeature(
            name,
            f"a head's IN_FEATURES asks for {name!r}; this backbone returns {', '.join(self)}. For heads "
            "that start at p2 set MODEL.BACKBONE.NAME to build_rev_{vit,mvit}_fpn_backbone, for RetinaNet's, "
            "which start at p3, to build_retinanet_rev_{vit,mvit}_fpn_backbone; C4 and DC5 configs have no "
            "pyramid, take one with FPN",
        )


class ReversibleBackbone(Backbone):
    """A Detectron2 backbone whose ``blocks`` work on two streams of tokens.

    Subclasses build ``blocks`` and call `finish`, which initialises and freezes.

    Args:
        patch_kernel, patch_stride, patch_padding: of the patch embedding's convolution.
        in_chans: channels of the images.
        embed_dim: width C of the first tokens.
        depth: number of blocks.
        num_heads, mlp_ratio: of the blocks that the subclass builds; only checked here.
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
        num_heads: int,
        mlp_ratio: float,
        drop_path_rate: float,
        pretrain_img_size: int,
        activations: str,
        keep_attention: bool,
    ):
        super().__init__()
        check_activations(activations)
        check_count("in_chans", in_chans)
        check_blocks(embed_dim, depth, num_heads, mlp_ratio, drop_path_rate)
        check_patches(patch_kernel, patch_stride, patch_padding, pretrain_img_size)
        # Called after each run of reversible blocks, to look at it.
        self.observer: Callable[[Run], None] | None = None
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
        if not is_whole(freeze_at) or not 0 <= freeze_at <= 1 + len(self.blocks):
            raise ValueError(
                f"freeze_at must be 0 (nothing) to {1 + len(self.blocks)} (embeddings and all blocks), "
                f"got {freeze_at!r}"
            )
        if freeze_at:
            self.pos_embed.requires_grad_(False)
            self.patch_embed.requires_grad_(False)
            self.blocks[: freeze_at - 1].requires_grad_(False)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return FeatureShapes(super().output_shape())

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their position embedding. (B, in_chans, H, W) -> (B, H'*W', C), (H', W')."""
        x = self.patch_embed(images)  # (B, H', W', C)
        hw = (x.shape[1], x.shape[2])
        # The sum is in the position embedding's precision: float32 under autocast too. The convolution leaves
        # channels first in memory; a layer norm would copy tokens that lie so, in every block.
        return (x + get_abs_pos(self.pos_embed, False, hw)).flatten(1, 2).contiguous(), hw

    def run(self, first: int, last: int, x: Tensor, *args, masks: Masks) -> tuple[Tensor, Tensor]:
        """Apply the reversible blocks from number ``first`` to ``last``, both included, to equal streams.

        If there is an ``observer``, it is called with a `Run` afterwards.

        Args:
            x: both streams, (B, N, C).
            args: passed to every F.
            masks: of all blocks of the backbone, as `draw_masks` returns them.

        Returns:
            the two streams, 2 x (B, N, C).
        """
        blocks, masks = self.blocks[first : last + 1], masks[first : last + 1]
        y1, y2 = run_blocks(
            blocks, x, x, *args, masks=masks, activations=self.activations, keep_attention=self.keep_attention
        )
        if self.observer is not None:
            self.observer(Run(first, tuple(blocks), x, (y1, y2), args, tuple(masks)))
        return y1, y2

    def normalise(self, norm: ScaleNorm, x1: Tensor, x2: Tensor) -> Tensor:
        """The tokens of a scale from its two streams. 2 x (B, N, C) -> (B, N, 2C)."""
        if self.activations == "cached":
            return norm(x1, x2)
        return recompute(norm, x1, x2, parts=norm.parts(x1))

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
