"""load_pretrained: every tensor accounted for, all or nothing, and errors that say what to do."""

import logging

import pytest
import safetensors.torch
import torch
from tiny_named import add_tiny_model
from tiny_weights import (
    make_detector,
    make_mvit,
    make_vit,
    mmpretrain_state,
    pyslowfast_container,
    refuse,
    renumbered,
    same,
    snapshot,
    without_prefix,
)
from torch.nn import functional

from rev_det.checkpoint import convert_state_dict, load_pretrained
from rev_det.classify import load_classifier
from rev_det.modeling import RevViT

HEAD = ["head.projection.weight", "head.projection.bias"]
ONE = torch.zeros(1)


def backbone_of(model, prefix):
    state = model.state_dict()
    return without_prefix({key: value for key, value in state.items() if key.startswith(prefix)}, prefix)


# What loads, and where.


def test_containers_of_the_official_saver_load(shared):
    for name, model in (("vit", make_vit()), ("mvit", make_mvit(out_features=("scale4",)))):
        path = shared / "reference" / "container" / f"tiny_rev_{name}.pyth"
        result = load_pretrained(model, path)
        assert (result.layout, result.loaded) == ("pyslowfast", len(model.state_dict()))
        official = torch.load(path, weights_only=True)["model_state"]
        assert same(model.state_dict(), convert_state_dict(official))


def test_every_layout_and_format_gives_the_same_model(official_vit, tmp_path):
    ours = convert_state_dict(official_vit)
    torch.save(pyslowfast_container(official_vit), tmp_path / "REV_VIT_S.pyth")
    torch.save({"state_dict": mmpretrain_state(official_vit), "meta": {}}, tmp_path / "mm.pth")
    torch.save({"model": ours, "iteration": 5}, tmp_path / "model_final.pth")
    safetensors.torch.save_file(
        {f"module.{key}": value for key, value in ours.items()}, tmp_path / "a.safetensors"
    )
    layouts = {}
    for path in sorted(tmp_path.iterdir()):
        model = make_vit()
        result = load_pretrained(model, path)
        assert same(model.state_dict(), ours)
        assert result.loaded == result.expected == len(ours)
        assert not (result.missing or result.unexpected or result.resized or result.initialised)
        layouts[path.name] = result.layout, len(result.dropped)
    assert layouts == {
        "REV_VIT_S.pyth": ("pyslowfast", 2),
        "mm.pth": ("mmpretrain", 2),
        "model_final.pth": ("rev_det", 0),
        "a.safetensors": ("rev_det", 0),
    }


def test_an_mvit_takes_the_final_norm_for_its_last_scale_and_keeps_its_other_norms(official_mvit):
    model = make_mvit()
    before = snapshot(model)
    result = load_pretrained(model, official_mvit)
    others = [f"scale{i}_norm.{what}" for i in (2, 3) for what in ("weight", "bias")]
    assert result.initialised == others
    assert result.dropped == HEAD
    assert result.loaded == result.expected == len(before) - 4
    state = model.state_dict()
    assert torch.equal(state["scale4_norm.weight"], official_mvit["norm.weight"])
    assert all(torch.equal(state[key], before[key]) for key in others)


def test_a_final_norm_whose_scale_is_not_returned_is_dropped(official_mvit):
    result = load_pretrained(make_mvit(out_features=("scale2", "scale3")), official_mvit)
    assert result.dropped == [*HEAD, "scale4_norm.weight", "scale4_norm.bias"]
    assert result.loaded == result.expected


@pytest.mark.parametrize(
    "backbone, prefix, make",
    [
        ("build_rev_vit_backbone", "backbone.", make_vit),
        ("build_rev_vit_fpn_backbone", "backbone.net.", make_vit),
        ("build_rev_mvit_fpn_backbone", "backbone.bottom_up.", make_mvit),
    ],
)
def test_a_backbones_weights_load_into_pyramids_and_detectors_and_back(backbone, prefix, make):
    source = make().state_dict()
    detector = make_detector(backbone)
    before = snapshot(detector)
    result = load_pretrained(detector, source)
    assert same(backbone_of(detector, prefix), source)
    rest = [key for key in before if not key.startswith(prefix)]
    assert result.initialised == rest
    assert all(torch.equal(detector.state_dict()[key], before[key]) for key in rest)
    assert result.loaded == result.expected == len(source)

    pyramid = make_detector(backbone).backbone
    assert load_pretrained(pyramid, source).loaded == len(source)
    assert same(backbone_of(pyramid, prefix.removeprefix("backbone.")), source)

    back = make()
    result = load_pretrained(back, detector.state_dict())
    assert same(back.state_dict(), source)
    assert result.dropped == rest


def test_a_pyramid_and_a_detector_exchange_all_that_they_share():
    source, target = make_detector(), make_detector()
    pyramid = make_detector().backbone
    result = load_pretrained(pyramid, {"model": source.state_dict()})
    assert same(pyramid.state_dict(), backbone_of(source, "backbone."))
    assert all(not key.startswith("backbone.") for key in result.dropped)
    result = load_pretrained(target, pyramid.state_dict())
    assert same(backbone_of(target, "backbone."), pyramid.state_dict())
    assert result.initialised == [key for key in target.state_dict() if not key.startswith("backbone.")]


@pytest.mark.parametrize("prefix, norm", [("", ""), ("module.", ""), ("", "BN")])
def test_a_detectors_own_checkpoint_loads_whole(prefix, norm):
    source, target = make_detector(norm=norm), make_detector(norm=norm)
    result = load_pretrained(
        target, {f"{prefix}{k}": v for k, v in source.state_dict().items()}, evaluation=True
    )
    assert same(target.state_dict(), source.state_dict())
    assert result.loaded == result.expected == len(source.state_dict())
    assert not result.initialised


def test_a_wrapped_model_is_loaded_as_the_model_itself(official_vit):
    wrapped = torch.nn.DataParallel(make_vit())
    load_pretrained(wrapped, official_vit)
    assert same(wrapped.module.state_dict(), convert_state_dict(official_vit))


# What is changed on the way.


def test_a_position_embedding_for_another_grid_is_resized_bicubically(official_vit):
    model = make_vit(pretrain_img_size=96)
    result = load_pretrained(model, official_vit)
    grid = official_vit["pos_embed"].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    resized = functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.equal(model.pos_embed, resized.permute(0, 2, 3, 1).reshape(1, 36, 32))
    assert result.resized == ["pos_embed"]
    assert result.loaded == result.expected
    assert "from 4 x 4 to 6 x 6" in str(result)


@pytest.mark.parametrize("model_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("file_type", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_values_take_the_models_type_and_it_is_said(official_vit, file_type, model_type):
    model = make_vit().to(model_type)
    result = load_pretrained(model, {key: value.to(file_type) for key, value in official_vit.items()})
    expected = {k: v.to(file_type).to(model_type) for k, v in convert_state_dict(official_vit).items()}
    assert same(model.state_dict(), expected)
    note = f"69 tensors were converted from {str(file_type)[6:]} to {str(model_type)[6:]}"
    assert result.notes == ([] if file_type == model_type else [note])


# What does not fit.


def test_another_size_is_named():
    small = RevViT(embed_dim=384, num_heads=6).state_dict()
    words = (
        r"Rev-ViT-S \(width 384, depth 12\), the model is a Rev-ViT-B \(width 768, depth 12\).*"
        r"pos_embed \(1, 196, 384\) in the file, \(1, 196, 768\) in the model.*set MODEL.REV_VIT to .*"
        r"strict=False \(MODEL.REV.STRICT_WEIGHTS False\)"
    )
    with torch.device("meta"):
        base = RevViT()
    with pytest.raises(ValueError, match=words):
        load_pretrained(base, small)


def test_another_family_or_shape_of_blocks_is_named(official_vit, official_mvit):
    text = refuse(make_vit(), official_mvit, "Another family: the file holds a Rev-MViT .* is a Rev-ViT ")
    assert "missing in the file: norm.weight" in text
    refuse(make_mvit(), official_vit, "Another family: the file holds a Rev-ViT .* is a Rev-MViT ")
    refuse(make_vit(mlp_ratio=2.0), official_vit, r"mlp_ratio \(4.0 against 2.0\)")
    words = "last block of each stage 0, 2, 5.*last block of each stage 1, 3, 5"
    refuse(make_mvit(last_block_indexes=(1, 3, 5)), official_mvit, words)


def test_another_number_of_heads_is_an_error_though_every_shape_fits(official_vit):
    container = pyslowfast_container(official_vit, num_heads=4)
    assert load_pretrained(make_vit(), container).loaded == 69
    refuse(make_vit(num_heads=8), container, "first block has 4 attention heads, the model's has 8")
    # Where a file does not tell, only the published sizes have known heads.
    assert load_pretrained(make_vit(num_heads=8), official_vit).loaded == 69
    shapes = RevViT(embed_dim=384, num_heads=6).state_dict()
    theirs = {key.replace("blocks.", "rev_backbone.layers."): value for key, value in shapes.items()}
    refuse(
        RevViT(embed_dim=384, num_heads=12), theirs, "first block has 6 attention heads, the model's has 12"
    )
    # Our own files may have any number.
    assert load_pretrained(make_vit(num_heads=8), make_vit().state_dict()).loaded == 69


def test_other_heads_than_those_of_the_published_size_are_a_warning_for_our_own_files():
    small = RevViT(embed_dim=384, num_heads=6).state_dict()  # as a converted file is, too
    assert load_pretrained(RevViT(embed_dim=384, num_heads=6), small).warnings == []
    (warning,) = load_pretrained(RevViT(embed_dim=384, num_heads=12), small).warnings
    assert "Rev-ViT-S (width 384, depth 12), whose first block has 6 attention heads" in warning
    assert "the model's has 12 (NUM_HEADS)" in warning


@pytest.mark.parametrize("key", ["norm.weight", "rev_backbone.layers.2.G.mlp.fc1.bias", "pos_embed"])
def test_a_missing_tensor_is_an_error(official_vit, key):
    state = {k: v for k, v in official_vit.items() if k != key}
    refuse(make_vit(), state, f"1 missing in the file: {renumbered(key)}")


def test_of_an_mvits_norms_the_last_scales_is_needed_and_none_may_be_half_there(official_mvit):
    state = {key: value for key, value in official_mvit.items() if not key.startswith("norm.")}
    refuse(make_mvit(), state, "2 missing in the file: scale4_norm.weight, scale4_norm.bias")
    state = make_mvit().state_dict()
    del state["scale2_norm.bias"]
    refuse(make_mvit(), state, "missing in the file: scale2_norm.bias")


def test_an_unexpected_or_transposed_tensor_is_an_error(official_vit):
    refuse(make_vit(), {**official_vit, "extra.weight": ONE}, r"1 unexpected in the file: extra\.weight")
    refuse(make_vit(), {**official_vit, "pos_embed": torch.zeros(1, 17, 32)}, r"\(1, 17, 32\) in the file")
    key = "rev_backbone.layers.0.G.mlp.fc1.weight"
    words = r"blocks\.0\.G\.mlp\.fc1\.weight \(32, 128\) in the file, \(128, 32\) in the model"
    refuse(make_vit(), {**official_vit, key: official_vit[key].T}, words)


def test_a_detector_of_another_kind_is_an_error():
    source = make_detector(mask=False).state_dict()
    words = "missing in the file: roi_heads.mask_head.*set MODEL.MASK_ON False: .* without masks"
    refuse(make_detector(), source, words)
    words = "unexpected in the file: roi_heads.mask_head.*set MODEL.MASK_ON True: .* with masks"
    refuse(make_detector(mask=False), make_detector().state_dict(), words)
    plain = make_detector("build_rev_mvit_backbone", arch="ProposalNetwork", mask=False)
    refuse(plain, source, "unexpected in the file: backbone.fpn_")


@pytest.mark.parametrize("layout", [pyslowfast_container, mmpretrain_state])
def test_the_classifiers_head_is_put_back_for_classification(official_vit, monkeypatch, layout):
    add_tiny_model(monkeypatch)
    classifier, model, result = load_classifier(layout(official_vit))
    assert (model, result.loaded, result.expected, result.dropped) == ("rev_vit_tiny", 71, 71, [])
    assert same(classifier.head.state_dict(), {key[16:]: official_vit[key] for key in HEAD})
    # Converted files and detectors have none.
    assert load_classifier(convert_state_dict(official_vit))[0].head is None


def test_what_is_no_reversible_model_is_an_error(official_vit):
    refuse(torch.nn.Linear(2, 2), official_vit, "the model has no such backbone")


def test_files_of_detectron2s_zoo_are_refused_without_a_download():
    refuse(
        make_vit(), "detectron2://ImageNetPretrained/MSRA/R-50.pkl", "no reversible backbone.*MODEL.WEIGHTS"
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x.fill_(torch.nan), "NaN, infinite .* 1 tensors: norm.bias"),
        (lambda x: x.index_fill_(0, torch.tensor([3]), -torch.inf), "NaN, infinite .* 1 tensors: norm.bias"),
        (lambda x: x.double().fill_(1e300), "too large .* 1 tensors: norm.bias"),
        (lambda x: x.int(), "norm.bias is int32, allowed are dense floating-point"),
        (lambda x: x > 0, "norm.bias is bool, allowed"),
        (lambda x: x.to(torch.complex64), "norm.bias is complex64, allowed"),
        (lambda x: x.to_sparse(), "norm.bias is float32 sparse_coo, allowed"),
        (lambda x: x.to("meta"), "norm.bias is float32 without values .*, allowed"),
    ],
)
def test_values_that_are_no_real_numbers_are_an_error(official_vit, change, words):
    state = {**official_vit, "norm.bias": change(official_vit["norm.bias"].clone())}
    for strict in (True, False):
        refuse(make_vit(), state, words, strict=strict)


def test_not_strict_loads_what_fits_and_warns(official_vit, caplog):
    state = {key: value for key, value in official_vit.items() if key != "norm.bias"}
    state["norm.weight"] = torch.ones(63)
    model = make_vit()
    before = snapshot(model)
    with caplog.at_level(logging.WARNING, "rev_det"):
        result = load_pretrained(model, {**state, "extra": ONE}, strict=False)
    assert result.missing == ["norm.bias", "norm.weight"]
    assert result.unexpected == ["extra"]
    assert (result.loaded, result.expected) == (67, 69)
    ours = convert_state_dict(official_vit)
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key.startswith("norm.") else ours)[key])
    (record,) = caplog.records
    assert "norm.weight (63,) in the file, (64,) in the model" in record.getMessage()


def test_the_result_is_logged_in_one_block(official_mvit, caplog):
    with caplog.at_level(logging.INFO, "rev_det"):
        result = load_pretrained(make_mvit(), official_mvit)
    (record,) = caplog.records
    assert record.getMessage() == str(result)
    assert str(result).splitlines() == [
        "the state: 151/151 tensors loaded (pyslowfast layout)",
        "  dropped: head.projection.weight, head.projection.bias",
        "  initialised: scale2_norm.weight, scale2_norm.bias, scale3_norm.weight, scale3_norm.bias",
    ]


# A detector's heads.


@pytest.mark.parametrize(
    "arch, key, heads",
    [
        (
            "GeneralizedRCNN",
            "MODEL.ROI_HEADS.NUM_CLASSES",
            [
                f"roi_heads.{x}"
                for x in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
            ],
        ),
        ("RetinaNet", "MODEL.RETINANET.NUM_CLASSES", ["head.cls_score"]),
    ],
)
def test_heads_for_other_classes_start_anew_in_training_and_are_an_error_in_evaluation(
    arch, key, heads, caplog
):
    source = make_detector(classes=5, arch=arch).state_dict()
    target = make_detector(classes=3, arch=arch)
    words = rf"another number of classes: 5 in the file, 3 in the model \({key}\).*set {key} to the file's"
    assert "MODEL.REV_MVIT" not in refuse(target, source, words, evaluation=True)  # the backbone fits
    before = snapshot(target)
    with caplog.at_level(logging.WARNING, "rev_det"):
        result = load_pretrained(target, source)
    assert result.initialised == [f"{head}.{kind}" for head in heads for kind in ("weight", "bias")]
    assert result.loaded == result.expected == len(source) - len(result.initialised)
    for name, value in target.state_dict().items():
        assert torch.equal(value, (before if name in result.initialised else source)[name])
    (record,) = caplog.records
    assert "another number of classes" in record.getMessage()


def test_heads_that_differ_in_more_than_classes_are_an_error():
    source = make_detector().state_dict()
    source["roi_heads.box_predictor.bbox_pred.weight"] = torch.zeros(4, 16)  # one box for all classes
    source["roi_heads.box_predictor.bbox_pred.bias"] = torch.zeros(4)
    refuse(make_detector(), source, r"bbox_pred.weight \(4, 16\) in the file, \(12, 16\) in the model")
    source = make_detector().state_dict() | {"roi_heads.box_predictor.cls_score.bias": torch.tensor(1.0)}
    refuse(make_detector(), source, r"cls_score.bias \(\) in the file, \(4,\) in the model")


def test_evaluation_refuses_weights_without_heads_unless_asked(official_mvit):
    model = make_detector()
    for source in (official_mvit, make_detector().backbone.state_dict()):
        refuse(model, source, "no detection heads.*MODEL.REV.STRICT_WEIGHTS False", evaluation=True)
    result = load_pretrained(model, official_mvit, strict=False, evaluation=True)
    assert result.loaded == 151
    assert "which would be random" in result.warnings[0]
