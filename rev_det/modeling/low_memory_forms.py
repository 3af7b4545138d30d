"""Detectron2's own backbones, pyramids and heads, computed with less memory: the same weights and function.

What a module computes is not changed, but when: its backward pass computes again, exactly, what ordinary
training stores. Only the results of fused global attention are kept, for which a kernel would have to run
twice. Relative positions become a part of wider queries and keys, so that no map of all pairs of tokens is
ever in memory, in evaluation neither.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from detectron2.modeling import FPN, SimpleFeaturePyramid
from detectron2.modeling.backbone import mvit, swin, vit
from detectron2.modeling.backbone.utils import get_rel_pos, window_partition, window_unpartition
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from .backbone import pad_to_multiple
from .build import RevFPN
from .derived import Methods, derived, give_methods
from .kept_attention import attention, autocast_dtype, to_autocast_dtype
from .layers import parts_along
from .recomputation import recompute, recompute_each
from .repetition import WHOLE

logger = logging.getLogger(__name__)

# Keys from which a query's attention costs more to compute again than its result costs to keep.
KEPT_FROM_KEYS = 1024
# Values of a level of a pyramid below which its hidden features are rather kept.
SMALL_LEVEL = 2**22
# Fused kernels want heads of a multiple of this width in 16 bit.
_ALIGNMENT = 8


class LowMemory(NamedTuple):
    """What `low_memory` did to a model.

    Attributes:
        changed: the class of every module that is computed in another way, by name.
        left: why a module of a known class was left as it is, by name.
    """

    changed: dict[str, str]
    left: dict[str, str]


class _LessMemory(Methods):
    """Base of the methods below."""

    keep_attention = True

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        """Why this module cannot be called twice; nothing if it can."""
        if any(isinstance(m, _BatchNorm) for called in cls.called_twice(module) for m in called.modules()):
            return "its batch norm would update its statistics twice; FrozenBN, GN and LN do not"
        return ""

    @staticmethod
    def called_twice(module: nn.Module) -> list[nn.Module]:
        return [module]


def _as_stock() -> bool:
    """Whether somebody traces the model, who is to find Detectron2's operators."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def _trains() -> bool:
    return torch.is_grad_enabled() and not _as_stock()


# Attention with relative positions


class FusedViTAttention(_LessMemory):
    """For ViT's attention, (B, H, W, C) -> (B, H, W, C): a fused kernel instead of a map of all pairs."""

    def forward(self, x: Tensor) -> Tensor:
        if _as_stock():
            return super().forward(x)
        hw = x.shape[1:3]
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, H * W, d) each
        y = _attend(self, q, k, v, hw, hw)
        return self.proj(y.transpose(1, 2).flatten(2).unflatten(1, hw))


class FusedMViTAttention(_LessMemory):
    """For MViT's pooling attention, (B, H, W, C) -> (B, H', W', C'): the same."""

    def forward(self, x: Tensor) -> Tensor:
        if _as_stock():
            return super().forward(x)
        batch, *hw, _ = x.shape
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5).flatten(1, 2)
        q, k, v = (
            to_autocast_dtype(
                mvit.attention_pool(y, getattr(self, f"pool_{name}"), getattr(self, f"norm_{name}"))
            )
            for name, y in zip("qkv", qkv, strict=True)
        )  # (B * heads, H', W', d) each
        residual, heads = q, self.num_heads
        if self.window_size:
            q, padded = window_partition(q, self.q_win_size)
            k, v = (window_partition(y, self.kv_win_size)[0] for y in (k, v))
            heads = 1
        q_hw, k_hw = q.shape[1:3], k.shape[1:3]
        q, k, v = (y.flatten(1, 2).unflatten(0, (-1, heads)) for y in (q, k, v))
        y = _attend(self, q, k, v, q_hw, k_hw).flatten(0, 1).unflatten(1, q_hw)
        if self.window_size:
            y = window_unpartition(y, self.q_win_size, padded, residual.shape[1:3])
        if self.residual_pooling:
            y = y + residual
        return self.proj(y.unflatten(0, (batch, -1)).permute(0, 2, 3, 1, 4).flatten(3))


def _attend(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, q_hw, k_hw) -> Tensor:
    """Attention with the relative positions that a module of Detectron2 may have."""
    scale = self.scale
    if self.use_rel_pos:
        q, k = with_relative_positions(q, k, self.rel_pos_h, self.rel_pos_w, q_hw, k_hw, scale)
        scale = 1.0
    return attention(q, k, v, scale, keep=k.shape[-2] >= KEPT_FROM_KEYS)


def with_relative_positions(
    q: Tensor, k: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, q_hw, k_hw, scale: float
) -> tuple[Tensor, Tensor]:
    """Wider queries and keys, whose products are the logits with decomposed relative positions (MViTv2, 4.1).

    With q' = [scale q, h, w] and k' = [k, e_row, e_column], where h and w are a query's terms for every row
    and column of keys and e are unit vectors, q' k' = scale q k + h[row of k] + w[column of k].

    Args:
        q: (B, heads, q_h * q_w, d).
        k: (B, heads, k_h * k_w, d).
        rel_pos_h: (L, d), for the distances of rows; interpolated to as many as there are.
        rel_pos_w: the same for columns.
        q_hw, k_hw: heights and widths (q_h, q_w) and (k_h, k_w).
        scale: of the products of q and k alone.

    Returns:
        q' and k', (B, heads, ..., d'), with d' at least d + k_h + k_w.
    """
    q, k = to_autocast_dtype(q), to_autocast_dtype(k)
    rows, columns = (
        to_autocast_dtype(get_rel_pos(n, m, table))
        for n, m, table in zip(q_hw, k_hw, (rel_pos_h, rel_pos_w), strict=True)
    )  # (q_h, k_h, d) and (q_w, k_w, d)
    grid = q.unflatten(2, q_hw)
    h = torch.einsum("bnhwc,hkc->bnhwk", grid, rows).flatten(2, 3)
    w = torch.einsum("bnhwc,wkc->bnhwk", grid, columns).flatten(2, 3)
    e_rows = torch.eye(k_hw[0], dtype=k.dtype, device=k.device).repeat_interleave(k_hw[1], 0)
    e_columns = torch.eye(k_hw[1], dtype=k.dtype, device=k.device).repeat(k_hw[0], 1)
    return _widened(q * scale, [h, w]), _widened(k, [e_rows, e_columns])


def _widened(x: Tensor, others: list[Tensor]) -> Tensor:
    """x, (B, heads, N, d), beside others that broadcast to (B, heads, N, ...), at an aligned width."""
    width = x.shape[-1] + sum(y.shape[-1] for y in others)
    if width % _ALIGNMENT:
        others = [*others, x.new_zeros(1, -width % _ALIGNMENT)]
    return torch.cat([x, *(y.expand(*x.shape[:-1], -1) for y in others)], -1)


class FusedSwinAttention(_LessMemory):
    """For Swin's window attention, (windows, N, C) -> (windows, N, C), with biases and masks."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        if _as_stock() or dropout:
            return super().forward(x, mask)
        n = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.unflatten(0, (n, n)).permute(2, 0, 1)[None]  # (1, heads, N, N)
        if mask is not None:
            mask = mask[:, None].repeat(len(x) // len(mask), 1, 1, 1)  # (windows, 1, N, N)
        inputs = q, k, v, bias, mask
        # In parts of the windows, for wider queries and keys and their gradients are large.
        parts = parts_along(0, q, 10 * (q.numel() + q[..., 0].numel() * n))
        if torch.is_grad_enabled() and parts[1] > 1:
            y = recompute(self.attend, *inputs, parts=parts, modules=[])
        else:
            y = self.attend(*inputs)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Attention with a row of biases beside each query, and unit vectors beside the keys.

        Kernels without a bias are quicker, and none of them returns a map of all pairs as its gradient.
        """
        if mask is not None:
            bias = bias + mask
        q, k, v, bias = map(to_autocast_dtype, (q, k, v, bias))
        unit = torch.eye(bias.shape[-1], dtype=k.dtype, device=k.device)
        return attention(_widened(q * self.scale, [bias]), _widened(k, [unit]), v, 1.0, keep=False)


# Blocks: attention and MLP are computed again, one after the other


def _drop_path_mask(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """What drop path multiplies a branch of x with, drawn as it draws it; None for nothing."""
    if isinstance(drop_path, nn.Identity) or not drop_path.training:
        return None
    return drop_path(x.new_ones(len(x), *[1] * (x.dim() - 1), dtype=autocast_dtype(x)))


def _sum(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    return x + (y if mask is None else y * mask)


class RecomputedBlock(_LessMemory):
    """For blocks of attention and MLP, each with a skip connection; subclasses say what the former does."""

    def recomputed(self, x: Tensor, *args) -> Tensor:
        """The block's result, of which only x is kept, and large attention."""
        masks = [_drop_path_mask(self.drop_path, x) for _ in range(2)]
        attend = [m for name, m in self.named_children() if name not in ("norm2", "mlp", "residual")]
        (y,) = recompute_each(
            (self.attend, attend),
            [(partial(self.apply_mlp, mask=masks[1]), [self.norm2, self.mlp], self.mlp.fc2)],
            x,
            masks[0],
            *args,
            parts=self._mlp_parts(x),
            keep_attention=self.keep_attention,
        )
        return y

    def apply_mlp(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return _sum(x, self.mlp(to_autocast_dtype(self.norm2(x))), mask)

    def _mlp_parts(self, x: Tensor) -> tuple[int, int]:
        if any(isinstance(m, nn.Dropout) and m.p and m.training for m in self.mlp.modules()):
            return WHOLE  # so that random numbers are drawn as in ordinary training
        return parts_along(1, x, 2 * x[..., 0].numel() * self.mlp.fc1.out_features)


class RecomputedViTBlock(RecomputedBlock):
    """For ViT's blocks, (B, H, W, C) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        if not _trains():
            return super().forward(x)
        y = self.recomputed(x)
        return recompute(self.apply_residual, y, modules=[self.residual]) if self.use_residual_block else y

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = to_autocast_dtype(self.norm1(x))
        if self.window_size:
            y, padded = window_partition(y, self.window_size)
        y = self.attn(y)
        if self.window_size:
            y = window_unpartition(y, self.window_size, padded, x.shape[1:3])
        return _sum(x, y, mask)

    def apply_residual(self, x: Tensor) -> Tensor:
        return self.residual(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RecomputedMViTBlock(RecomputedBlock):
    """For MViT's blocks, (B, H, W, C) -> (B, H', W', C')."""

    def forward(self, x: Tensor) -> Tensor:
        return self.recomputed(x) if _trains() else super().forward(x)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = to_autocast_dtype(self.norm1(x))
        y = self.attn(normed)
        if hasattr(self, "proj"):
            x = self.proj(normed)
        if hasattr(self, "pool_skip"):
            x = mvit.attention_pool(x, self.pool_skip)
        return _sum(x, y, mask)


class RecomputedSwinBlock(RecomputedBlock):
    """For Swin's blocks, (B, H * W, C) -> (B, H * W, C)."""

    def forward(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        if not _trains():
            return super().forward(x, mask_matrix)
        # H and W are attributes, and another image's by the time of the backward pass.
        return self.recomputed(x, mask_matrix, self.H, self.W)

    def attend(self, x: Tensor, mask: Tensor | None, mask_matrix: Tensor, height: int, width: int) -> Tensor:
        size, shift = self.window_size, self.shift_size
        y = to_autocast_dtype(self.norm1(x)).unflatten(1, (height, width))
        y = functional.pad(y, (0, 0, 0, -width % size, 0, -height % size))
        padded = y.shape[1:3]
        if shift:
            y = y.roll((-shift, -shift), (1, 2))
        windows = swin.window_partition(y, size).flatten(1, 2)
        windows = self.attn(windows, mask=mask_matrix if shift else None).unflatten(1, (size, size))
        y = swin.window_reverse(windows, size, *padded)
        if shift:
            y = y.roll((shift, shift), (1, 2))
        return _sum(x, y[:, :height, :width].flatten(1, 2), mask)


# Pyramids and heads


class Recomputed(_LessMemory):
    """For modules of one tensor, and other arguments, that return one."""

    def forward(self, x: Tensor, *args) -> Tensor:
        if not _trains():
            return super().forward(x, *args)
        return recompute(super().forward, x, *args, modules=[self])


class RecomputedRoIs(_LessMemory):
    """For box heads, (R, C, S, S) -> (R, ...): convolutions are computed again in parts of the RoIs."""

    def forward(self, x: Tensor) -> Tensor:
        if not (_trains() and self.conv_norm_relus):  # what linear layers keep is small
            return super().forward(x)
        return recompute(super().forward, x, parts=parts_along(0, x, 16 * x.numel()), modules=[self])


class RecomputedRoILayers(_LessMemory):
    """For mask and keypoint heads, whose ``layers`` turn (R, C, S, S) into maps of each RoI: the same."""

    def layers(self, x: Tensor) -> Tensor:
        if not _trains():
            return super().layers(x)
        return recompute(super().layers, x, parts=parts_along(0, x, 16 * x.numel()), modules=[self])


class RecomputedRPNHead(_LessMemory):
    """For RPN's head: the hidden features of a level are computed again when its gradients are."""

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if not _trains():
            return super().forward(features)
        heads = [(m, [m], m) for m in (self.objectness_logits, self.anchor_deltas)]
        levels = []
        for x in features:
            if x.numel() < SMALL_LEVEL:
                hidden = self.conv(x)
                levels.append([head(hidden) for head, *_ in heads])
            else:
                levels.append(recompute_each((self.conv, [self.conv]), heads, x))
        logits, deltas = zip(*levels, strict=True)
        return list(logits), list(deltas)


class RecomputedFPN(_LessMemory):
    """For FPN: of the sums that its output convolutions read, the finest and largest is not kept."""

    @staticmethod
    def called_twice(module: nn.Module) -> list[nn.Module]:
        return [*module.lateral_convs, *module.output_convs]

    def forward(self, x) -> dict[str, Tensor]:
        if not _trains():
            return super().forward(x)
        bottom_up = self.bottom_up(x)
        names, above, results = self.in_features[::-1], None, []
        for i, (name, lateral, output) in enumerate(
            zip(names, self.lateral_convs, self.output_convs, strict=True)
        ):
            x = bottom_up[name]
            if i < len(names) - 1:
                merge = partial(self.merge, lateral), [lateral]
                above, y = recompute_each(merge, [(_same, []), (output, [output], output)], x, above)
            else:
                finest = partial(self.finest, lateral, output)
                parts = parts_along(0, x, 4 * x[:, 0].numel() * output.out_channels)
                y = recompute(finest, x, above, parts=parts, modules=[lateral, output], last=output)
            results.insert(0, y)
        if self.top_block is not None:
            name = self.top_block.in_feature
            results += self.top_block(
                bottom_up[name] if name in bottom_up else results[self._out_features.index(name)]
            )
        return dict(zip(self._out_features, results, strict=True))

    def merge(self, lateral: nn.Module, x: Tensor, above: Tensor | None) -> Tensor:
        """The sum of a level, which the next one and a convolution read."""
        y = lateral(x)
        if above is None:
            return y
        # In place of what nobody else reads. Autocast upsamples in float32 on CUDA, and so is the sum.
        upsampled = functional.interpolate(above, scale_factor=2.0, mode="nearest")
        y = upsampled.to(torch.promote_types(y.dtype, upsampled.dtype)).add_(y)
        return y / 2 if self._fuse_type == "avg" else y

    def finest(self, lateral: nn.Module, output: nn.Module, x: Tensor, above: Tensor | None) -> Tensor:
        """The result of the last level, in parts of the images."""
        return output(to_autocast_dtype(self.merge(lateral, x, above)))


class RecomputedRevFPN(RecomputedFPN):
    """For our FPN, which takes images of any size."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(pad_to_multiple(x, self._size_divisibility))


def _same(x: Tensor) -> Tensor:
    return x


_TABLE: Mapping[type, type[_LessMemory]] = {
    vit.Attention: FusedViTAttention,
    vit.Block: RecomputedViTBlock,
    mvit.MultiScaleAttention: FusedMViTAttention,
    mvit.MultiScaleBlock: RecomputedMViTBlock,
    swin.WindowAttention: FusedSwinAttention,
    swin.SwinTransformerBlock: RecomputedSwinBlock,
    swin.PatchMerging: Recomputed,
    FPN: RecomputedFPN,
    RevFPN: RecomputedRevFPN,
    StandardRPNHead: RecomputedRPNHead,
    FastRCNNConvFCHead: RecomputedRoIs,
    MaskRCNNConvUpsampleHead: RecomputedRoILayers,
    KRCNNConvDeconvUpsampleHead: RecomputedRoILayers,
}
# Modules that apply sequences of layers to one tensor, and how the sequences' names begin.
_SEQUENCES = {SimpleFeaturePyramid: ("simfp_",), RetinaNetHead: ("cls_subnet", "bbox_subnet")}


def low_memory(model: nn.Module, keep_attention: bool = True) -> nn.Module:
    """Make a Detectron2 detector or backbone train, and evaluate, with less memory.

    Treated are Detectron2's ViT, MViT and SwinTransformer, FPN and SimpleFeaturePyramid, the heads of RPN,
    RetinaNet and FCOS, and the box, mask and keypoint heads, Cascade's among them. The parts concerned get
    classes derived from their own. Weights, their names, outputs and gradients stay what they were, up to
    rounding, so that weights may be loaded before or after. Whatever has other code of its own, or batch norm
    that is trained, stays as it is. Tracing and export find Detectron2's own operators. Calling it again
    changes ``keep_attention`` alone.

    Args:
        model: that is built; changed in place, and given an attribute ``low_memory``, a `LowMemory`.
        keep_attention: keep the results of global attention (tokens * channels values for each layer) rather
            than compute them twice.

    Returns:
        the model.

    Raises:
        ValueError: it has none of these parts.
    """
    before = _changed(model)
    left = give_methods(model, _TABLE)
    for name, module in model.named_modules():
        prefixes = tuple(key for cls, keys in _SEQUENCES.items() if isinstance(module, cls) for key in keys)
        for key, sequence in module.named_children():
            if key.startswith(prefixes) and type(sequence) is nn.Sequential and prefixes:
                if reason := Recomputed.obstacle(sequence):
                    left[f"{name}.{key}".lstrip(".")] = reason
                else:
                    sequence.__class__ = derived(nn.Sequential, Recomputed)
    changed = _changed(model)
    for name, reason in left.items():
        logger.warning("%s is computed as before: %s", name, reason)
    if not changed:
        known = ", ".join(sorted({cls.__name__ for cls in (*_TABLE, *_SEQUENCES)}))
        raise ValueError(f"low_memory finds nothing to change in {type(model).__name__}; it knows {known}")
    if changed == before:
        logger.info("low_memory: all that can be changed has been changed before")
    else:
        logger.info("low_memory: %d modules are computed with less memory", len(changed) - len(before))
    for name in changed:
        model.get_submodule(name).keep_attention = keep_attention
    model.low_memory = LowMemory(changed, left)
    return model


def _changed(model: nn.Module) -> dict[str, str]:
    return {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, _LessMemory)}
