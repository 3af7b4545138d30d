"""From a command line to a checked config: what is settled, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from rev_det.engine import argument_parser, check_run, checks, load_config, main

TINY = ("DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('tiny',)")


@pytest.fixture
def check(nano_mvit, tiny_dataset, tmp_path):
    """Load and check a run of the nano config on the tiny set, with more options and keys."""

    def load(*opts: str, options: tuple[str, ...] = (), config: str = nano_mvit):
        words = ["--config-file", config, "--dataset", tiny_dataset, *options]
        args = argument_parser().parse_args([*words, "OUTPUT_DIR", str(tmp_path / "output"), *TINY, *opts])
        cfg = load_config(args.config_file, args.opts, args.dataset, args.num_gpus, args.eval_only)
        check_run(cfg, args)
        return cfg

    return load


def test_arguments_are_detectron2s_and_repeatable_datasets():
    args = argument_parser().parse_args(
        ["--dataset", "a=x:y", "--num-gpus", "2", "--dataset", "b=x:y", "--resume", "--eval-only", "KEY", "1"]
    )
    assert args.dataset == ["a=x:y", "b=x:y"]
    assert (args.num_gpus, args.resume, args.eval_only, args.opts) == (2, True, True, ["KEY", "1"])


def test_datasets_of_the_command_line_join_those_of_the_config(nano_mvit, tiny_dataset):
    name, _, paths = tiny_dataset.partition("=")
    annotations, _, images = paths.partition(":")
    opts = ["DATASETS.COCO_JSON", repr([["from_config", annotations, images]]), "DATASETS.TRAIN", "('tiny',)"]
    cfg = load_config(nano_mvit, opts, [tiny_dataset])
    assert [entry[0] for entry in cfg.DATASETS.COCO_JSON] == ["from_config", name]
    assert cfg.is_frozen()


def test_classes_and_mask_format_are_taken_from_the_data(check):
    cfg = check()
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_cpu_is_used_with_a_warning(check, caplog):
    assert check("MODEL.DEVICE", "cuda").MODEL.DEVICE == "cpu"
    assert "MODEL.DEVICE is 'cuda', but there is no CUDA device: using the CPU" in caplog.text


@pytest.fixture
def two_gpus(monkeypatch):
    """Two CUDA devices that may be counted, but not used."""

    def initialize():
        raise AssertionError("CUDA is initialised")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", initialize)


@pytest.mark.parametrize(
    "device, options, message",
    [
        ("cuda:2", (), "MODEL.DEVICE is 'cuda:2'; allowed on this machine are cuda, cuda:0, cuda:1, cpu"),
        ("cuda", ("--num-gpus", "3"), "--num-gpus is 3, but this machine has 2 CUDA devices"),
        ("cuda:1", ("--num-gpus", "2"), "'cuda:1', a single device, but there are 2 proc.*set it to 'cuda'"),
        ("cuda:0", ("--num-machines", "2", "--dist-url", "tcp://a:1"), "'cuda:0', a single device"),
    ],
)
def test_devices_that_are_not_there_or_too_few(check, two_gpus, device, options, message):
    with pytest.raises(ValueError, match=message):
        check("MODEL.DEVICE", device, options=options)


@pytest.mark.parametrize("device, processes", [("cuda", "2"), ("cuda:1", "1")])
@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_the_process_that_starts_the_others_leaves_cuda_alone(check, two_gpus, device, processes, dtype):
    amp = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", dtype)
    cfg = check("MODEL.DEVICE", device, *amp, options=("--num-gpus", processes))
    assert cfg.MODEL.DEVICE == device


def test_the_model_is_checked_without_values(check, monkeypatch):
    built, build = [], checks.build_detector
    monkeypatch.setattr(checks, "build_detector", lambda cfg: built.append(build(cfg)) or built[-1])
    check()
    assert {parameter.device.type for parameter in built[-1].parameters()} == {"meta"}


def test_who_reads_the_files_of_a_run_does_not_load_the_trainer():
    code = "import sys, rev_det.engine.metrics; print('rev_det.engine.trainer' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_several_processes_on_the_cpu_need_no_gpu(check):
    assert check("MODEL.DEVICE", "cpu", options=("--num-gpus", "2")).MODEL.DEVICE == "cpu"


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            ("MODEL.REV_MVIT.DEPHT", "9"),
            r"no config key MODEL.REV_MVIT.DEPHT; did you mean MODEL.REV_MVIT.DEPTH\?",
        ),
        (("MODEL.REV_MVIT.DEPTH", "nine"), "MODEL.REV_MVIT.DEPTH"),
        (("MODEL.MASK_ON",), "must alternate, but MODEL.MASK_ON has no value"),
        (("SOLVER.MAX_ITER", "SOLVER.BASE_LR", "0.1"), "SOLVER.MAX_ITER has no value"),
        (("MODEL.MASK_ON", "True", "False"), r"must alternate, but \d+ words are given: .* True False"),
        (
            ("DATASETS.TRAIN", "few"),
            r"""got 'few'. On a command line, in quotes, as DATASETS.TRAIN "\('tiny',\)"$""",
        ),
        (("MODEL.ANCHOR_GENERATOR.SIZES", "8"), r"""MODEL.ANCHOR_GENERATOR.SIZES "\[\[.*\]\]"$"""),
        (("--resume", "True"), "--resume comes after the first KEY VALUE pair"),
        (("MODEL.DEVICE", "gpu"), "MODEL.DEVICE is 'gpu'; allowed on this machine are .*cpu"),
        (("MODEL.DEVICE", "meta"), "MODEL.DEVICE is 'meta'; allowed on this machine are .*cpu"),
        (("MODEL.BACKBONE.NAME", "rev_mvit"), "config cannot be built: .*rev_mvit.*BACKBONE"),
        (("MODEL.REV_MVIT.LAST_BLOCK_INDEXES", "(0, 2, 1, 8)"), "(?i)last_block_indexes"),
        (("MODEL.REV_MVIT.LAST_BLOCK_INDEXES", "(0, 2, 6, 7)"), "(?i)last_block_indexes"),
        (("MODEL.REV_MVIT.OUT_FEATURES", "('scale9',)"), "(?i)out_features|scale9"),
        (("MODEL.REV_MVIT.NUM_HEADS", "3"), "(?i)num_heads"),
        (("MODEL.REV.ACTIVATIONS", "rebuilt"), "(?i)activations"),
        (("MODEL.ROI_HEADS.NUM_CLASSES", "7"), "NUM_CLASSES is 7.*3 classes"),
        (("SOLVER.OPTIMIZER", "Lion"), "SOLVER.OPTIMIZER is 'Lion'"),
        (("SOLVER.LR_SCHEDULER_NAME", "Cosine"), "LR scheduler: Cosine"),
        (
            ("SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cpu", "SOLVER.AMP.DTYPE", "fp16"),
            "SOLVER.AMP.DTYPE",
        ),
        (("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "l2"), "CLIP_TYPE is 'l2'"),
        (("DATASETS.TRAIN", "('unknown',)"), "dataset 'unknown' is not registered"),
        (("DATASETS.TRAIN", "()"), "DATASETS.TRAIN is empty"),
        (
            ("MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", "('boxes.pkl',)"),
            "DATASETS.PROPOSAL_FILES_TRAIN must be .*pickles, which could run code, got .'boxes.pkl'",
        ),
    ],
)
def test_bad_keys_and_values_are_named(check, opts, message):
    with pytest.raises(ValueError, match=message):
        check(*opts)


@pytest.mark.parametrize(
    "key, values",
    {
        "SOLVER.MAX_ITER": ("0", "-5", "1.5", "True", "None", "''"),
        "SOLVER.IMS_PER_BATCH": ("0", "-2"),
        "SOLVER.ACCUMULATE": ("0",),
        "SOLVER.CHECKPOINT_PERIOD": ("0", "-1"),
        "SOLVER.WARMUP_ITERS": ("-1",),
        "SOLVER.CHECKPOINT_KEEP": ("-1",),
        "SOLVER.AMP.MAX_SKIPPED_STEPS": ("-1",),
        "SOLVER.DDP.COMPRESSION": ("zip",),
        "SOLVER.WARMUP_FACTOR": ("-1.0",),
        "SOLVER.BASE_LR": ("0.0", "-1.0", "1e400", "1", "fast", "None"),
        "SOLVER.BASE_LR_END": ("5.0", "-1.0"),
        "SOLVER.WEIGHT_DECAY": ("-0.1",),
        "SOLVER.WEIGHT_DECAY_NORM": ("-0.1",),
        "SOLVER.WEIGHT_DECAY_BIAS": ("-0.1",),
        "SOLVER.GAMMA": ("0.0",),
        "SOLVER.STEPS": ("('a',)", "(5, 3)", "(3, 3)", "(0,)", "5", "None"),
        "SOLVER.MOMENTUM": ("1.0", "-0.1"),
        "SOLVER.LAYER_DECAY": ("0.0", "1.5"),
        "SOLVER.BETAS": ("(0.9,)", "(0.9, 1.5)", "('a', 'b')", "None"),
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ("0.0", "-1.0"),
        "SOLVER": ("foo", "{}"),
        "DATALOADER.SAMPLER_TRAIN": ("foo", "RandomSubsetTrainingSampler"),
        "DATALOADER.NUM_WORKERS": ("-1",),
        "DATALOADER.REPEAT_THRESHOLD": ("-1.0",),
        "DATASETS.TRAIN": ("tiny", "None"),
        "INPUT.FORMAT": ("foo", "''", "1"),
        "INPUT.MASK_FORMAT": ("foo",),
        "INPUT.RANDOM_FLIP": ("foo",),
        "INPUT.MIN_SIZE_TRAIN": ("()", "64", "('64',)", "(64, 1)", "(64, 1000000)"),
        "INPUT.MAX_SIZE_TRAIN": ("1", "1000000"),
        "INPUT.MAX_SIZE_TEST": ("0", "1000000"),
        "INPUT.LSJ.SIZE": ("1000000",),
        "INPUT.MIN_SIZE_TEST": ("1000000", "-1"),
        "SEED": ("4294967296",),
        "INPUT.AUGMENTATION": ("foo",),
        "MODEL.PIXEL_MEAN": ("[1.0, 2.0]", "[]", "None"),
        "MODEL.PIXEL_STD": ("[0.0, 1.0, 1.0]", "['a', 'b', 'c']"),
        "MODEL.LOAD_PROPOSALS": ("True",),
        "MODEL.REV_MVIT.EMBED_DIM": ("-8", "0", "True"),
        "MODEL.REV_MVIT.PATCH_STRIDE": ("(0, 0)", "(4, 8)"),
        "MODEL.REV.FREEZE_AT": ("-1", "99"),
        "MODEL.REV.INVERSION_PERIOD": ("-1",),
        "MODEL.REV.INVERSION_THRESHOLD": ("-0.1", "1e400"),
        "MODEL.FPN.IN_FEATURES": ("p2", "['p2']", "['scale2', 'scale4']", "['scale3', 'scale2']", "[1]"),
        "MODEL.FPN.NORM": ("FOO",),
        "MODEL.FPN.OUT_CHANNELS": ("0", "-4", "48"),
        "MODEL.FPN.FUSE_TYPE": ("max",),
        "MODEL.RPN.IN_FEATURES": ("['res4']", "['p9']"),
        "MODEL.RPN.POSITIVE_FRACTION": ("7.0",),
        "MODEL.RPN.NMS_THRESH": ("-0.1", "1.5"),
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": ("0",),
        "MODEL.RPN.POST_NMS_TOPK_TEST": ("-1",),
        "MODEL.RPN.IOU_THRESHOLDS": ("[0.3, 7.0]",),
        "MODEL.ROI_HEADS.IN_FEATURES": ("['p9']",),
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": ("-4", "0"),
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": ("7.0", "-0.5"),
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": ("1.1",),
        "MODEL.ROI_BOX_HEAD.FC_DIM": ("-1",),
        "MODEL.RETINANET.PRIOR_PROB": ("0.0", "1.0"),
        "MODEL.ANCHOR_GENERATOR.SIZES": ("[[8], [16]]",),
        "TEST.AUG.MIN_SIZES": ("()", "(0, 64)", "(1000000,)"),
        "TEST.DETECTIONS_PER_IMAGE": ("0", "-2"),
        "TEST.EXPECTED_RESULTS": ("[1]", "[['bbox', 'AP', 50.0]]"),
        "OUTPUT_DIR": ("folder\udcff", "''", __file__, f"{__file__}/below/it"),
    }.items(),
)
def test_values_that_a_run_would_stumble_over_are_named_with_their_key(check, key, values):
    for value in values:
        with pytest.raises(ValueError, match=key.replace(".", "[.]")):
            check(key, value)


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            ("MODEL.FPN.IN_FEATURES", "['scale2']"),
            "MODEL.RPN.IN_FEATURES: .* asks for 'p4'; this backbone returns p2, p3",
        ),
        (("MODEL.BACKBONE.NAME", "build_rev_mvit_backbone"), "MODEL.RPN.IN_FEATURES: .*'p2'.*scale5"),
        (("MODEL.ROI_BOX_HEAD.NUM_FC", "0"), "cannot be built: `assert .*` failed"),
        (("MODEL.ANCHOR_GENERATOR.SIZES", "[['a']]"), "cannot be built: unsupported operand"),
        (("MODEL.KEYPOINT_ON", "True"), "cannot be built: .*keypoint_names"),
    ],
)
def test_what_cannot_be_built_is_said_in_detectron2s_words_or_better_ones(check, opts, message):
    with pytest.raises(ValueError, match=message):
        check(*opts)


def test_values_with_a_meaning_of_their_own_pass(check):
    check("INPUT.MIN_SIZE_TRAIN", "(0,)", "INPUT.MIN_SIZE_TEST", "0", "SOLVER.WEIGHT_DECAY_BIAS", "None")
    check("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[100.0]", "MODEL.PIXEL_STD", "[50.0]")
    check("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 50.0, 1.0]]", "TEST.EVAL_PERIOD", "-1")


@pytest.fixture
def own_data(tiny_dataset, tmp_path):
    """A copy of the tiny set: annotations, a function to write them, images' folder, name, --dataset."""
    _, _, paths = tiny_dataset.partition("=")
    annotations, _, images = paths.partition(":")
    folder = shutil.copytree(images, tmp_path / "images")
    content = json.loads(Path(annotations).read_text())
    file = tmp_path / "own.json"
    name = tmp_path.name  # Detectron2 keeps what a test has registered
    return content, lambda: file.write_text(json.dumps(content)), folder, name, f"{name}={file}:{folder}"


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_an_image_that_is_none_is_found_before_anything_is_written(
    own_data, tiny_run, nano_mvit, capsys, key
):
    content, write, folder, name, dataset = own_data
    write()
    image = content["images"][-1]["file_name"]
    (folder / image).write_text("<html>not found</html>")
    code = main(tiny_run(nano_mvit, key, f"('{name}',)", options=("--dataset", dataset)))
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and error.startswith("error: image ") and f"{image} (image_id" in error
    assert "cannot be decoded" in error
    assert not (folder.parent / "output").exists()


def test_classes_in_another_order_than_in_training_are_an_error(
    own_data, tiny_run, nano_mvit, tmp_path, capsys
):
    assert main(tiny_run(nano_mvit, "DATASETS.TEST", "()")) == 0
    content, write, _, name, dataset = own_data
    names = [category["name"] for category in content["categories"]]
    for category, other in zip(content["categories"], reversed(names), strict=True):
        category["name"] = other
    write()
    opts = {"TRAIN": f"('{name}',)", "TEST": f"('{name}',)"}
    opts = [word for key, value in opts.items() for word in (f"DATASETS.{key}", value)]
    opts += ["SOLVER.MAX_ITER", "3", "MODEL.WEIGHTS", str(tmp_path / "output/model_final.pth")]
    for option in ("--eval-only", "--resume"):
        words = tiny_run(nano_mvit, *opts, options=(option,))
        words[words.index("--dataset") + 1] = dataset
        assert main(words) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"model_final.pth was trained on other classes than the data have (0: {names[0]}, " in error
        assert main([*words, "MODEL.REV.STRICT_CLASSES", "False"]) == 0


def test_training_data_of_crowd_regions_alone_are_an_error(own_data, tiny_run, nano_mvit, capsys):
    content, write, folder, name, dataset = own_data
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    write()
    assert main(tiny_run(nano_mvit, "DATASETS.TRAIN", f"('{name}',)", options=("--dataset", dataset))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"DATASETS.TRAIN is ('{name}',), where all {len(content['annotations'])} annotations are crowd"
        in error
    )
    assert not (folder.parent / "output").exists()


@pytest.mark.parametrize(
    "options, opts, message",
    [
        (("--num-gpus", "0"), (), "--num-gpus 0 .*at least 1"),
        (("--num-gpus", "99"), ("MODEL.DEVICE", "cuda"), r"--num-gpus is 99, but this machine has \d+ CUDA"),
        (("--num-gpus", "3"), ("MODEL.DEVICE", "cpu"), "IMS_PER_BATCH is 8, which 3 processes"),
        (("--num-machines", "2", "--machine-rank", "2"), (), "--machine-rank 2 must be from 0 to 1"),
        (("--num-machines", "2"), (), "--num-machines above 1 needs --dist-url"),
        (("--num-gpus", "2"), ("MODEL.DEVICE", "cpu", "SEED", "4294967295"), "SEED .* most 4294967294"),
        (("--eval-only",), ("DATASETS.TEST", "()"), "DATASETS.TEST is empty"),
        (("--dataset", "nonsense"), (), "--dataset 'nonsense'"),
    ],
)
def test_bad_arguments_are_named(check, options, opts, message):
    with pytest.raises(ValueError, match=message):
        check(*opts, options=options)


def test_weights_that_are_missing_or_do_not_fit_are_told_and_nothing_is_written(
    tiny_run, nano_mvit, tmp_path, capsys
):
    def fails(path: str, *options: str) -> str:
        assert main(tiny_run(nano_mvit, "MODEL.WEIGHTS", path, options=options)) == 2
        assert not (tmp_path / "output").exists()
        return capsys.readouterr().err.splitlines()[-1]

    for options in ((), ("--eval-only",), ("--resume",)):
        assert (
            fails("/no/such/weights.pth", *options)
            == "error: weight file /no/such/weights.pth does not exist"
        )
    assert "no weights to evaluate: set MODEL.WEIGHTS" in fails("", "--eval-only")
    path = str(tmp_path / "backbone.pth")
    args = argument_parser().parse_args(tiny_run(nano_mvit))
    backbone = build_model(load_config(nano_mvit, args.opts, args.dataset)).backbone.bottom_up.state_dict()
    torch.save({"model": backbone}, path)
    assert "backbone.pth" in fails(path, "--eval-only")
    torch.save({"model": dict(list(backbone.items())[:-1])}, path)
    assert "backbone.pth" in fails(path)
    assert main(tiny_run(nano_mvit, "MODEL.WEIGHTS", path, "MODEL.REV.STRICT_WEIGHTS", "False")) == 0


def test_evaluation_does_not_need_the_training_data(check, tmp_path):
    path = str(tmp_path / "detector.pth")
    torch.save({"model": build_model(check()).state_dict()}, path)
    absent = ("DATASETS.TRAIN", "('unknown',)")
    cfg = check("MODEL.WEIGHTS", path, *absent, options=("--eval-only",))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    with pytest.raises(ValueError, match="dataset 'unknown' is not registered"):
        check("MODEL.WEIGHTS", path, *absent)


def test_datasets_of_detectron2_that_are_not_there_are_an_error(nano_mvit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    opts = ["DATASETS.TRAIN", "('coco_2017_train',)", "DATASETS.TEST", "('coco_2017_val',)"]
    args = argument_parser().parse_args(["--config-file", nano_mvit, *opts])
    with pytest.raises(
        FileNotFoundError, match="instances_val2017.json of dataset 'coco_2017_val'.*DETECTRON2_DATA"
    ):
        check_run(load_config(nano_mvit, opts), args)


def test_a_dataset_of_the_command_line_that_no_key_names_is_an_error(
    tiny_dataset, nano_mvit, monkeypatch, tmp_path, capsys
):
    # Where the config's own sets, the shapes, would be drawn.
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    words = ["--config-file", nano_mvit, "--dataset", tiny_dataset]
    for more, key in (([], "TRAIN"), (["--eval-only"], "TEST")):
        assert main([*words, *more]) == 2
        assert capsys.readouterr().err == (
            "error: --dataset 'tiny' is in neither DATASETS.TRAIN nor DATASETS.TEST; "
            f"add DATASETS.{key} \"('tiny',)\"\n"
        )
    assert not list(tmp_path.iterdir())


def test_an_evaluation_may_name_the_training_set_too(tiny_dataset, nano_mvit):
    train = tiny_dataset.replace("tiny=", "also_tiny=")
    opts = ["DATASETS.TRAIN", "('also_tiny',)", "DATASETS.TEST", "('tiny',)", "MODEL.DEVICE", "cpu"]
    cfg = load_config(nano_mvit, opts, [train, tiny_dataset], eval_only=True)
    assert cfg.DATASETS.TRAIN == ("also_tiny",)


def test_a_long_warmup_is_warned_of_when_training_and_not_when_evaluating(check, caplog, tmp_path):
    opts = ("SOLVER.MAX_ITER", "150", "SOLVER.WARMUP_ITERS", "100")
    path = str(tmp_path / "detector.pth")
    torch.save({"model": build_model(check(*opts)).state_dict()}, path)
    assert "WARMUP_ITERS is 100, too long for this schedule of 150 iterations" in caplog.text
    caplog.clear()
    check("MODEL.WEIGHTS", path, *opts, options=("--eval-only",))
    assert "SOLVER.BASE_LR" not in caplog.text


def test_annotations_that_are_not_coco_are_an_error(nano_mvit, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="bad.json"):
        load_config(nano_mvit, ["DATASETS.TRAIN", "('bad',)"], [f"bad={path}:{tmp_path}"])
