"""Rules for the values of config keys and arguments: what is allowed, in one table, and how errors say it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# Sides in pixels: of what a JPEG can be, and of the largest square image that Pillow reads.
MAX_SIDE, MAX_SQUARE = 65_500, 9_459


class Rule(NamedTuple):
    """What a value must be, in words, whether it is, and how an error says so."""

    words: str
    holds: Callable[[Any], bool]
    form: str = "{name} must be {words}, got {value!r}"


def is_whole(value: Any) -> bool:
    """Whether a value is an integer; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value is a number, neither infinite nor NaN; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int = 1, most: float = math.inf) -> Rule:
    """Whole numbers in a range, both ends included."""
    words = f"a whole number of at least {least}" + (f" and at most {most}" if most < math.inf else "")
    return Rule(words, lambda value: is_whole(value) and least <= value <= most)


def one_of(*words: str) -> Rule:
    """Some words."""
    form = "{name} is {value!r}; allowed are {words}"
    return Rule(", ".join(map(repr, words)), lambda value: value in words, form)


def all_are(rule: Rule, number: int | None = None, words: str = "") -> Rule:
    """Sequences, of some length or any above 0, whose items obey a rule."""

    def holds(values: Any) -> bool:
        is_sequence = isinstance(values, Sequence) and not isinstance(values, str)
        return is_sequence and len(values) == (number or max(len(values), 1)) and all(map(rule.holds, values))

    return Rule(words or f"a list, each of it {rule.words}", holds)


def check(name: str, value: Any, rule: Rule) -> None:
    """Require a value to obey a rule.

    Raises:
        ValueError: it does not; the message begins with the name.
    """
    _require(rule.holds(value), name, value, rule)


def _require(holds: bool, name: str, value: Any, rule: Rule) -> None:
    if not holds:
        raise ValueError(rule.form.format(name=name, words=rule.words, value=value))


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Require a whole number of at least ``minimum``: see `check`."""
    check(name, value, whole(minimum))


def check_pair(name: str, value: Any, minimum: int = 1) -> None:
    """Require two whole numbers of at least ``minimum``, for height and width: see `check`."""
    words = f"two whole numbers of at least {minimum}, for height and width"
    check(name, value, all_are(whole(minimum), 2, words))


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Require one of some words: see `check`."""
    check(name, value, one_of(*allowed))


COUNT, COUNT_OR_0 = whole(1), whole(0)
POSITIVE = Rule("a number above 0", lambda value: is_finite(value) and value > 0)
NOT_NEGATIVE = Rule("a number of at least 0", lambda value: is_finite(value) and value >= 0)
FRACTION = Rule("a number from 0 to 1", lambda value: is_finite(value) and 0 <= value <= 1)
BELOW_1 = Rule("a number of at least 0 and below 1", lambda value: is_finite(value) and 0 <= value < 1)
_SHORT_SIDE = Rule(
    f"a short side in pixels, from 2 to {MAX_SQUARE}, or 0 for no resize",
    lambda value: is_whole(value) and (value == 0 or 2 <= value <= MAX_SQUARE),
)
_SHORT_SIDES = all_are(_SHORT_SIDE)

# What the value of a key must be, whatever the others are: all keys of a rule.
_KEYS: dict[Rule, str] = {
    COUNT: """
        MODEL.FPN.OUT_CHANNELS MODEL.RETINANET.NUM_CLASSES MODEL.RETINANET.TOPK_CANDIDATES_TEST
        MODEL.ROI_BOX_HEAD.CONV_DIM MODEL.ROI_BOX_HEAD.FC_DIM MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE MODEL.ROI_HEADS.NUM_CLASSES
        MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION MODEL.ROI_MASK_HEAD.CONV_DIM
        MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION MODEL.RPN.BATCH_SIZE_PER_IMAGE MODEL.RPN.PRE_NMS_TOPK_TRAIN
        MODEL.RPN.PRE_NMS_TOPK_TEST MODEL.RPN.POST_NMS_TOPK_TRAIN MODEL.RPN.POST_NMS_TOPK_TEST
        MODEL.SEM_SEG_HEAD.NUM_CLASSES SOLVER.ACCUMULATE SOLVER.CHECKPOINT_PERIOD SOLVER.IMS_PER_BATCH
        SOLVER.MAX_ITER""",
    COUNT_OR_0: """
        DATALOADER.NUM_WORKERS MODEL.RETINANET.NUM_CONVS MODEL.REV.INVERSION_PERIOD
        MODEL.ROI_BOX_HEAD.NUM_CONV MODEL.ROI_BOX_HEAD.NUM_FC MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO
        MODEL.ROI_MASK_HEAD.NUM_CONV MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO SOLVER.AMP.MAX_SKIPPED_STEPS
        SOLVER.CHECKPOINT_KEEP SOLVER.REFERENCE_IMS_PER_BATCH SOLVER.WARMUP_ITERS""",
    FRACTION: """
        MODEL.RETINANET.FOCAL_LOSS_ALPHA MODEL.RETINANET.NMS_THRESH_TEST MODEL.RETINANET.SCORE_THRESH_TEST
        MODEL.ROI_HEADS.NMS_THRESH_TEST MODEL.ROI_HEADS.POSITIVE_FRACTION MODEL.ROI_HEADS.SCORE_THRESH_TEST
        MODEL.RPN.NMS_THRESH MODEL.RPN.POSITIVE_FRACTION""",
    all_are(FRACTION): """
        MODEL.RETINANET.IOU_THRESHOLDS MODEL.ROI_BOX_CASCADE_HEAD.IOUS MODEL.ROI_HEADS.IOU_THRESHOLDS
        MODEL.RPN.IOU_THRESHOLDS""",
    BELOW_1: "SOLVER.MOMENTUM",
    NOT_NEGATIVE: """
        DATALOADER.REPEAT_THRESHOLD MODEL.RETINANET.FOCAL_LOSS_GAMMA MODEL.RETINANET.SMOOTH_L1_LOSS_BETA
        MODEL.REV.INVERSION_THRESHOLD MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT
        MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA MODEL.RPN.BBOX_REG_LOSS_WEIGHT MODEL.RPN.LOSS_WEIGHT
        MODEL.RPN.SMOOTH_L1_BETA SOLVER.BASE_LR_END SOLVER.BIAS_LR_FACTOR SOLVER.WARMUP_FACTOR
        SOLVER.WEIGHT_DECAY SOLVER.WEIGHT_DECAY_BIAS SOLVER.WEIGHT_DECAY_NORM""",
    POSITIVE: "SOLVER.BASE_LR SOLVER.GAMMA",
    all_are(POSITIVE): "MODEL.PIXEL_STD",
    all_are(Rule("a finite number", is_finite)): "MODEL.PIXEL_MEAN",
    # Of a single pixel nothing is left to flip.
    whole(2, MAX_SIDE): "INPUT.MAX_SIZE_TRAIN",
    whole(1, MAX_SIDE): "INPUT.MAX_SIZE_TEST TEST.AUG.MAX_SIZE",
    all_are(whole(1, MAX_SQUARE)): "TEST.AUG.MIN_SIZES",
    whole(0, MAX_SQUARE): "INPUT.MIN_SIZE_TEST",
    whole(1, MAX_SQUARE): "INPUT.LSJ.SIZE",
    # Outside of config files it may also be a single number.
    Rule(_SHORT_SIDES.words, lambda v: _SHORT_SIDE.holds(v) or _SHORT_SIDES.holds(v)): "INPUT.MIN_SIZE_TRAIN",
    # Those that build_train_loader can resume.
    one_of("TrainingSampler", "RepeatFactorTrainingSampler"): "DATALOADER.SAMPLER_TRAIN",
    one_of("default", "swin", "lsj"): "INPUT.AUGMENTATION",
    one_of("relative", "relative_range", "absolute", "absolute_range"): "INPUT.CROP.TYPE",
    one_of("choice", "range"): "INPUT.MIN_SIZE_TRAIN_SAMPLING",
    one_of("none", "horizontal", "vertical"): "INPUT.RANDOM_FLIP",
    one_of("sum", "avg"): "MODEL.FPN.FUSE_TYPE",
    one_of("auto", "bf16", "fp16"): "SOLVER.AMP.DTYPE",
    one_of("full_model", "norm", "value"): "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    one_of("none", "fp16", "bf16"): "SOLVER.DDP.COMPRESSION",
    one_of("sqrt", "linear", "none"): "SOLVER.LR_SCALING",
    one_of("AdamW", "SGD"): "SOLVER.OPTIMIZER",
    Rule(
        "the smallest and the largest factor, both above 0, such as (0.1, 2.0)",
        lambda scales: all_are(POSITIVE, 2).holds(scales) and scales[0] <= scales[1],
    ): "INPUT.LSJ.SCALES",
    Rule("a number above 0 and below 1", lambda v: is_finite(v) and 0 < v < 1): "MODEL.RETINANET.PRIOR_PROB",
    all_are(BELOW_1, 2, "two numbers of at least 0 and below 1"): "SOLVER.BETAS",
    Rule(
        "above 0 and at most 1, which is no decay", lambda v: is_finite(v) and 0 < v <= 1
    ): "SOLVER.LAYER_DECAY",
    Rule(
        "iterations, increasing, the first above 0",
        lambda v: all(map(COUNT.holds, v)) and all(a < b for a, b in itertools.pairwise(v)),
    ): "SOLVER.STEPS",
    Rule(
        "at least 1, or -1 for all", lambda v: is_whole(v) and (v > 0 or v == -1)
    ): "TEST.DETECTIONS_PER_IMAGE",
    Rule(
        "a list of [TASK, METRIC, VALUE, TOLERANCE], for example [['bbox', 'AP', 48.0, 0.5]]",
        lambda v: all(isinstance(e, Sequence) and len(e) == 4 and all(map(is_finite, e[2:])) for e in v),
    ): "TEST.EXPECTED_RESULTS",
}
_RULES = {key: rule for rule, keys in _KEYS.items() for key in keys.split()}

_SAFE_PROPOSALS = "at a detectron2:// address: Detectron2 reads proposals as pickles, which could run code"
# What it must be beside the values of others; these are asked of the config.
_RELATIONS: dict[str, Rule] = {
    "DATASETS.PROPOSAL_FILES_TRAIN": Rule(
        f"one for each of DATASETS.TRAIN with MODEL.LOAD_PROPOSALS, {_SAFE_PROPOSALS}",
        lambda cfg: (
            not cfg.MODEL.LOAD_PROPOSALS
            or len(cfg.DATASETS.PROPOSAL_FILES_TRAIN) == len(cfg.DATASETS.TRAIN)
            and _are_safe(cfg.DATASETS.PROPOSAL_FILES_TRAIN)
        ),
    ),
    "DATASETS.PROPOSAL_FILES_TEST": Rule(
        f"with MODEL.LOAD_PROPOSALS {_SAFE_PROPOSALS}",
        lambda cfg: not cfg.MODEL.LOAD_PROPOSALS or _are_safe(cfg.DATASETS.PROPOSAL_FILES_TEST),
    ),
    "INPUT.CROP.SIZE": Rule(
        "two shares above 0 and at most 1 with INPUT.CROP.TYPE 'relative' or 'relative_range', else two "
        "numbers of pixels, of 'absolute_range' the smaller first",
        lambda cfg: not cfg.INPUT.CROP.ENABLED or _is_crop_size(cfg.INPUT.CROP.SIZE, cfg.INPUT.CROP.TYPE),
    ),
    "INPUT.MIN_SIZE_TRAIN": Rule(
        "two short sides, the smallest first, with INPUT.MIN_SIZE_TRAIN_SAMPLING 'range'",
        lambda cfg: cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING != "range" or _is_range(cfg.INPUT.MIN_SIZE_TRAIN),
    ),
    # One channel is spread over as many as there are means.
    "MODEL.PIXEL_MEAN": Rule(
        "a number for each channel of INPUT.FORMAT: three, or one with 'L'",
        lambda cfg: len(cfg.MODEL.PIXEL_MEAN) == 3 or cfg.INPUT.FORMAT == "L",
    ),
    "MODEL.PIXEL_STD": Rule(
        "as many numbers as MODEL.PIXEL_MEAN has",
        lambda cfg: len(cfg.MODEL.PIXEL_STD) == len(cfg.MODEL.PIXEL_MEAN),
    ),
    "SOLVER.BASE_LR_END": Rule(
        "at most SOLVER.BASE_LR", lambda cfg: cfg.SOLVER.BASE_LR_END <= cfg.SOLVER.BASE_LR
    ),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": Rule(
        POSITIVE.words,
        lambda cfg: not cfg.SOLVER.CLIP_GRADIENTS.ENABLED or cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE > 0,
    ),
    "SOLVER.NESTEROV": Rule(
        "False without a SOLVER.MOMENTUM above 0",
        lambda cfg: not cfg.SOLVER.NESTEROV or cfg.SOLVER.MOMENTUM > 0,
    ),
}


def check_config(cfg: CfgNode, *sections: str) -> None:
    """Require the values of a config to obey all rules that there are for them.

    Args:
        cfg: a config, of which some keys may be missing or None.
        sections: beginnings of keys, such as "SOLVER."; other keys are not looked at.

    Raises:
        ValueError: one does not; the message begins with its key.
    """
    for rules, subject in ((_RULES, None), (_RELATIONS, cfg)):
        for key, rule in rules.items():
            value = value_of(cfg, key) if key.startswith(sections) else None
            if value is not None:
                _require(rule.holds(value if subject is None else subject), key, value, rule)


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of a key such as "MODEL.DEVICE"; None where there is no such key."""
    for name in key.split("."):
        cfg = cfg.get(name) if isinstance(cfg, Mapping) else None
    return cfg


def _are_safe(paths: Sequence[str]) -> bool:
    return all(path.startswith("detectron2://") for path in paths)


def _is_crop_size(size: Sequence[Any], style: str) -> bool:
    share = Rule("", lambda value: is_finite(value) and 0 < value <= 1)
    is_size = all_are(share if style.startswith("relative") else COUNT, 2).holds(size)
    return is_size and (style != "absolute_range" or size[0] <= size[1])


def _is_range(sizes: Any) -> bool:
    return is_whole(sizes) or (len(sizes) == 2 and sizes[0] <= sizes[1])
