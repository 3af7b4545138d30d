"""Every configuration key that rev_det adds to Detectron2's defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def add_rev_det_config(cfg: CfgNode) -> None:
    """Add rev_det's keys, with their defaults, to a Detectron2 config (in place).

    A config that has them, such as one of rev_det's zoo, stays as it is.

    Args:
        cfg: a config made by ``detectron2.config.get_cfg()``.
    """
    from detectron2.config import CfgNode as CN

    if "REV" in cfg.MODEL:
        return
    # Compute Detectron2's own backbones, pyramids and heads with less memory: rev_det.low_memory.
    cfg.MODEL.LOW_MEMORY = False
    # What both families share.
    rev = cfg.MODEL.REV = CN()
    # "reversible" rebuilds activations in the backward pass, "cached" is ordinary autograd,
    # "checkpoint" recomputes each block with torch.utils.checkpoint. Same function, same gradients.
    rev.ACTIVATIONS = "reversible"
    # How stage transitions (which are not reversible) are kept: "checkpoint", "cached", or "auto":
    # checkpoint, except with ACTIVATIONS "cached".
    rev.TRANSITIONS = "auto"
    # Keep the fused attention's output and log-sum-exp so that the rebuild skips the attention kernel.
    rev.KEEP_ATTENTION = True
    # Let attention take cuDNN's kernel, which torch prefers on an H100. It makes a plan for every new shape,
    # and training on images of many sizes waits for each of them; for one size it may be the fastest kernel.
    rev.CUDNN_ATTENTION = False
    # 0: train everything; 1: freeze the patch and position embeddings; 1 + k: and the first k blocks.
    rev.FREEZE_AT = 0
    # How outputs are made of the two streams (Table 6): "concat-norm", "norm-concat", "norm-1-layer",
    # "norm-2x-mlp", "norm-2x-mlp-dropout" or "norm-2x-mlp-norm". The published models are "concat-norm".
    rev.TERMINATION = "concat-norm"
    # The naive variant of Table 5, with skip connections inside F and G; an ablation.
    rev.INNER_RESIDUAL = False
    # Every so many iterations each run of reversible blocks is inverted, and the error of its rebuilt input,
    # relative to the true one, is logged; 0: never. Above the threshold there is a warning.
    rev.INVERSION_PERIOD = 1000
    rev.INVERSION_THRESHOLD = 0.01
    # Anything missing, unexpected or of another shape in MODEL.WEIGHTS is an error unless False.
    rev.STRICT_WEIGHTS = True
    # To resume or evaluate a checkpoint with other classes, or in another order, than it was trained on is an
    # error unless False.
    rev.STRICT_CLASSES = True

    # Rev-ViT; the defaults are Rev-ViT-B.
    vit = cfg.MODEL.REV_VIT = CN()
    vit.PATCH_SIZE = 16
    vit.EMBED_DIM = 768
    vit.DEPTH = 12
    vit.NUM_HEADS = 12
    vit.MLP_RATIO = 4.0
    vit.QKV_BIAS = True
    vit.DROP_PATH_RATE = 0.0
    # Side, in pixels, of the square images the position embedding was trained on.
    vit.PRETRAIN_IMG_SIZE = 224
    vit.OUT_FEATURE = "last_feat"

    # Rev-MViT; the defaults are Rev-MViT-B.
    mvit = cfg.MODEL.REV_MVIT = CN()
    mvit.PATCH_KERNEL = (7, 7)
    mvit.PATCH_STRIDE = (4, 4)
    mvit.PATCH_PADDING = (3, 3)
    mvit.EMBED_DIM = 96
    mvit.DEPTH = 16
    mvit.NUM_HEADS = 1
    # Index of the last block of each stage; the first block of every stage but the first is its transition.
    mvit.LAST_BLOCK_INDEXES = (0, 2, 13, 15)
    mvit.QKV_POOL_KERNEL = (3, 3)
    # Pooling stride of keys and values in the first stage; divided by 2 at each transition, at least 1.
    mvit.ADAPTIVE_KV_STRIDE = 4
    mvit.MLP_RATIO = 4.0
    mvit.QKV_BIAS = True
    mvit.DROP_PATH_RATE = 0.0
    mvit.PRETRAIN_IMG_SIZE = 224
    # How transitions fuse the two streams (Table 6): "2x-mlp", "4x-mlp", "norm-2x-mlp", "2x-mlp-dropout",
    # "concat" or "max". The published model is "2x-mlp".
    mvit.FUSION = "2x-mlp"
    # Scales to return (stride 4, 8, 16, 32): each is the normalised concatenation of both streams.
    mvit.OUT_FEATURES = ("scale2", "scale3", "scale4", "scale5")

    # COCO-format datasets registered in every process: [[name, annotations.json, image_root], ...];
    # the same as --dataset name=annotations.json:image_root on the command line.
    cfg.DATASETS.COCO_JSON = []

    # Training augmentations: "default" is Detectron2's resize and flip; "swin" puts a crop before it every
    # other time; "lsj" is large-scale jitter. MIN_SIZE_TRAIN, MAX_SIZE_TRAIN (not for "lsj") and
    # RANDOM_FLIP hold as ever; CROP is for "default" alone.
    cfg.INPUT.AUGMENTATION = "default"
    # Large-scale jitter: side of the square training images in pixels, and the range of resize factors.
    cfg.INPUT.LSJ = CN()
    cfg.INPUT.LSJ.SIZE = 1024
    cfg.INPUT.LSJ.SCALES = (0.1, 2.0)

    # IMS_PER_BATCH images make one step of the optimizer, in this many forward and backward passes one after
    # the other: for batches that do not fit. The gradient is the mean over them.
    cfg.SOLVER.ACCUMULATE = 1
    # Images per step that BASE_LR and the iterations of the schedule are written for; with another
    # IMS_PER_BATCH they are rescaled, except what the command line gives. 0: never.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0
    # How BASE_LR follows the batch size: "sqrt", "linear" or "none".
    cfg.SOLVER.LR_SCALING = "sqrt"
    # "AdamW" or "SGD".
    cfg.SOLVER.OPTIMIZER = "AdamW"
    # AdamW's running-average coefficients.
    cfg.SOLVER.BETAS = (0.9, 0.999)
    # "auto": bfloat16 where the device has it, else float16 with a loss scaler; or "bf16", "fp16".
    cfg.SOLVER.AMP.DTYPE = "auto"
    # float16 alone: steps that overflow are skipped; more than this many in a row end the run.
    cfg.SOLVER.AMP.MAX_SKIPPED_STEPS = 20
    # Each block of the backbone learns at this fraction of the rate of the block after it; 1: all alike.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # How many periodic checkpoints to keep, besides the last and the best; 0: all.
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    # DistributedDataParallel: look for parameters without gradient in every step; assume the same graph in
    # every step; compress gradients on their way between processes ("none", "fp16" or "bf16").
    cfg.SOLVER.DDP = CN()
    cfg.SOLVER.DDP.FIND_UNUSED_PARAMETERS = False
    cfg.SOLVER.DDP.STATIC_GRAPH = False
    cfg.SOLVER.DDP.COMPRESSION = "none"

    # The checkpoint with the highest value of this metric is kept as model_best.pth.
    cfg.TEST.BEST_METRIC = "bbox/AP"
