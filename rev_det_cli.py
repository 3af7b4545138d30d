"""The ``rev-det`` command: its arguments, and errors in one line.

This module stands beside the package because importing ``rev_det`` loads torch and Detectron2, which takes
seconds: help, the version and wrong arguments need neither. A command's own module in ``rev_det.cli`` is
imported to run it.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import inspect
import io
import os
import sys
from collections.abc import Sequence

_PREDICT_EXAMPLES = """
examples:
  with what a training run wrote, on a folder and a video:
    rev-det predict photos/ street.mp4 --run output/demo
  with weights and the name of a config, a few classes alone:
    rev-det predict "photos/**/*.jpg" --weights model_final.pth
        --config-file mask_rcnn_rev_mvit_b_fpn_3x --classes person dog --threshold 0.7
  results for an evaluation, with the image ids of its file:
    rev-det predict val/ --run output --dataset-json val.json --threshold 0.05 --no-pictures
"""

_EXPORT_EXAMPLES = """
examples:
  a detector as TorchScript, for images of any size, with the config beside the weights:
    rev-det export --weights output/demo/model_final.pth --format torchscript --output detector.ts
  as ONNX, for images of 800 x 1344 pixels, with scores from 0.5:
    rev-det export --config-file mask_rcnn_rev_mvit_b_fpn_3x --weights model_final.pth --format onnx
        --size 800 1344 --output detector.onnx MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.5
  its backbone for torch.export:
    rev-det export --weights model_final.pth --format torch-export --part backbone --output backbone.pt2
"""

_FORM = "NAME=JSON:IMAGES"

_FILE_HELP = (
    "path or URL of a weight file (PySlowFast, mmpretrain or rev_det; .pth, .pyth, .safetensors), with an "
    "optional #sha256=<64 hexadecimal digits> that is verified"
)

_MODELS = ("rev_mvit_b", "rev_vit_s", "rev_vit_b", "rev_vit_l")

_PRESETS = ("detection", "low_memory", "depth", "table1", "figure1", "figure3b", "figure3c")

_BENCH_EXAMPLES = """
examples:
  memory and FLOPs beside all peers, counted:
    rev-det bench --model rev_mvit_b --size 800x1344 --batch 2 --peers
  a whole detector, on the GPU:
    rev-det bench --config-file configs/COCO-Detection/mask_rcnn_rev_mvit_b_fpn_3x.yaml --device cuda
  the largest batch on a card of 16 GB:
    rev-det bench --model rev_vit_b --size 224x224 --dtype fp32 --max-batch --memory-limit 16GB
  memory against depth, as a picture:
    rev-det bench --preset depth --plot depth.png
"""

_ANALYZE_EXAMPLES = """
examples:
  rev-det analyze mask_rcnn_rev_mvit_b_fpn_3x --size 800x1280
  rev-det analyze output/config.yaml --no-flops --opts MODEL.REV.KEEP_ATTENTION False
  how exactly the blocks' inputs are rebuilt, with trained weights:
  rev-det analyze output/config.yaml --no-flops --no-fits --inversion --opts MODEL.WEIGHTS model_final.pth
"""


def _train(parser: argparse.ArgumentParser) -> None:
    """Train or evaluate a detector: the arguments of train_net.py, which only a checkout has."""
    parser.add_argument("arguments", nargs="*")


def _predict(parser: argparse.ArgumentParser) -> None:
    """Predict with a trained detector on images and videos: pictures, and results in COCO's format."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _PREDICT_EXAMPLES
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="image or video files, folders (not those below them), patterns in quotes",
    )
    model = parser.add_argument_group("detector")
    model.add_argument(
        "--run", metavar="DIR", help="OUTPUT_DIR of a training: its config and last checkpoint"
    )
    model.add_argument("--weights", metavar="FILE", help="of a trained detector")
    model.add_argument(
        "--config-file",
        metavar="CONFIG",
        help="a YAML file, or the name of a model in the zoo (default: config.yaml beside the weights)",
    )
    model.add_argument(
        "--dataset-json",
        metavar="FILE",
        help="in COCO's format: names of the classes, ids of the images (default: the data trained on)",
    )
    what = parser.add_argument_group("what is kept and written")
    what.add_argument("--output", default="predictions", metavar="DIR", help="folder (default: predictions)")
    what.add_argument("--threshold", type=float, default=0.5, metavar="S", help="lowest score (default: 0.5)")
    what.add_argument("--classes", nargs="+", default=[], metavar="NAME", help="these alone (default: all)")
    what.add_argument("--no-pictures", action="store_true", help="write the JSON files alone: much faster")
    how = parser.add_argument_group("how")
    how.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    how.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    how.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="mixed precision (default: as the config says on a GPU, none on the CPU)",
    )
    how.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys that override the config's"
    )


def _report(parser: argparse.ArgumentParser) -> None:
    """One HTML page of a training run: figures, curves, AP of each class, predictions and config.

    The page needs neither network nor JavaScript. A run that is under way or was killed has one too.
    """
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="of the training run")
    parser.add_argument("--output", metavar="FILE", help="the page (default: OUTPUT_DIR/report.html)")


def _export(parser: argparse.ArgumentParser) -> None:
    """Write a trained detector, or its backbone, to a file that runs without rev_det and Detectron2.

    The file is checked before it is kept: it must compute what the model computes.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPORT_EXAMPLES
    parser.add_argument(
        "--config-file",
        metavar="CONFIG",
        help="a YAML file, or the name of a model in the zoo (default: config.yaml beside the weights)",
    )
    parser.add_argument("--weights", metavar="FILE", help="of a trained detector")
    parser.add_argument("--format", required=True, help="torchscript, onnx or torch-export")
    parser.add_argument("--part", default="detector", help="detector (default) or backbone")
    parser.add_argument("--output", required=True, metavar="FILE", help="ends with .ts or .pt, .onnx or .pt2")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="of the input it is made with; a detector in ONNX takes no other (default: as the config tests)",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="to try the detector on, with objects of its classes (default: a pattern)",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config keys that override the config file's"
    )


def _data(parser: argparse.ArgumentParser) -> None:
    """Look at data in COCO's format before training on them: check all of it, and see some of it."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    check = actions.add_parser(
        "check",
        help="say what is wrong, and how bad",
        description="Examine annotations and decode every image: broken files, wrong sizes, masks and boxes "
        "outside, empty classes, duplicate ids; with several sets also images that two of them share. The "
        "exit code is 1 if there are errors: training would stop, or mean nothing.",
    )
    check.add_argument(
        "sets", nargs="+", metavar=_FORM, help="a name, annotations and the folder of the images"
    )

    view = actions.add_parser(
        "view",
        help="draw annotated images",
        description="Draw a contact sheet of annotated images, chosen by chance.",
    )
    view.add_argument("set", metavar=_FORM, help="a name, annotations and the folder of the images")
    view.add_argument("--output", metavar="FILE", help="the picture (default: NAME.png)")
    view.add_argument("--num", type=int, default=16, metavar="N", help="images at most (default: 16)")
    view.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another one shows others (default: 0)"
    )
    view.add_argument(
        "--classes", nargs="+", default=[], metavar="NAME", help="images with one of these alone"
    )


def _doctor(parser: argparse.ArgumentParser) -> None:
    """Examine the installation: versions, CUDA, Detectron2, operators, gradients; for each problem its fix.

    The exit code is 1 if there are problems.
    """


def _weights(parser: argparse.ArgumentParser) -> None:
    """Say what a weight file is, convert it for Detectron2, and check what a model computes with it."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    inspect = actions.add_parser(
        "inspect",
        help="say what a file is",
        description="Print a weight file's layout, sizes and problems, and the model it fits. "
        "The exit code is 0 for a sound file, 1 for one with problems, 2 for one that cannot be read.",
    )
    inspect.add_argument("file", metavar="FILE", help=_FILE_HELP)
    inspect.add_argument("--json", action="store_true", help="print JSON")

    convert = actions.add_parser(
        "convert",
        help="write a file for Detectron2",
        description="Write a file's weights under the names that a Detectron2 detector has for them. "
        "A classifier's head and an optimizer's state are left out.",
    )
    convert.add_argument("file", metavar="FILE", help=_FILE_HELP)
    convert.add_argument("out", metavar="OUT", help="the new file, .pth or .safetensors")
    convert.add_argument("--force", action="store_true", help="overwrite OUT if it is there")

    check = actions.add_parser(
        "check",
        help="load a file and print what the model computes",
        description="Load a file into a named model, strictly, and print a fingerprint of its outputs on a "
        "fixed input, computed in float64 on the CPU: the same on every machine.",
    )
    check.add_argument("file", metavar="FILE", help=_FILE_HELP)
    check.add_argument(
        "--model",
        metavar="NAME",
        help="rev_vit_s, rev_vit_b, rev_vit_l, rev_vit_h or rev_mvit_b (default: the one that the file fits)",
    )


def _classify(parser: argparse.ArgumentParser) -> None:
    """Classify images with a published file's own classifier, or measure its accuracy on ImageNet."""
    parser.add_argument(
        "--weights",
        required=True,
        metavar="FILE",
        help="path or URL of a published file, with its classifier",
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--imagenet",
        metavar="DIR",
        help="instead of images: a folder with a folder of images for each class, in order of their names",
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes to print for each IMAGE (5)")
    parser.add_argument("--labels", metavar="FILE", help="text file with the name of a class on each line")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (64)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; a GPU if there is one if not given")
    parser.add_argument(
        "--amp", action="store_true", help="mixed precision: bfloat16 where the device has it, else float16"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that read images (up to 4, as the machine has cores)",
    )


def _bench(parser: argparse.ArgumentParser) -> None:
    """Memory, FLOPs and time of a training step, ours beside its peers.

    Without --device the figures are counted: exactly, for any size, without a GPU. With it they are measured.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _BENCH_EXAMPLES
    what = parser.add_argument_group("what to train").add_mutually_exclusive_group()
    what.add_argument("--model", choices=_MODELS, help="a backbone alone (default: rev_mvit_b)")
    what.add_argument(
        "--config-file",
        metavar="CONFIG",
        help="a whole detector, optimizer and all: a YAML file, or the name of a model in the zoo",
    )
    what.add_argument(
        "--preset", choices=_PRESETS, help="a set of cases: the paper's table and figures, and ours"
    )
    parser.add_argument(
        "--opts",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="config keys that override the config file's",
    )
    cases = parser.add_argument_group("cases; every combination is run")
    cases.add_argument("--activations", nargs="+", metavar="MODE", help="cached, checkpoint, reversible")
    cases.add_argument(
        "--keep-attention",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep the results of fused attention when recomputing (default: yes)",
    )
    cases.add_argument(
        "--peers",
        action="store_true",
        help="besides: cached, checkpoint with and without kept attention, Detectron2's own model",
    )
    cases.add_argument("--depth", nargs="+", type=int, metavar="N", help="blocks")
    cases.add_argument("--batch", nargs="+", type=int, metavar="N", help="images in a step (default: 2)")
    cases.add_argument("--size", nargs="+", metavar="HxW", help="in pixels (default: 800x1344)")
    cases.add_argument("--dtype", choices=("bf16", "fp32"), help="of autocast (default: bf16)")
    cases.add_argument(
        "--max-batch", action="store_true", help="find the largest batch that fits instead of --batch"
    )
    cases.add_argument("--memory-limit", metavar="16GB", help="memory there is to be; enforced on a device")
    how = parser.add_argument_group("how")
    method = how.add_mutually_exclusive_group()
    method.add_argument("--count", action="store_true", help="count, as without --device")
    method.add_argument("--device", help="cuda, cuda:1 or cpu: measure there")
    how.add_argument(
        "--device-rules",
        choices=("cuda", "cpu"),
        help="whose autocast and kernels are counted (default: cuda)",
    )
    how.add_argument(
        "--warm-up", type=int, metavar="N", help="steps before the timed ones (5; detectors: 100)"
    )
    how.add_argument("--steps", type=int, metavar="N", help="timed steps (20; detectors: 400)")
    out = parser.add_argument_group("output, besides the table")
    out.add_argument("--at-peak", type=int, metavar="N", help="list the N largest tensors alive at each peak")
    out.add_argument("--json", metavar="FILE")
    out.add_argument("--csv", metavar="FILE")
    out.add_argument("--plot", metavar="FILE", help="a picture: .png, .pdf or .svg")


def _analyze(parser: argparse.ArgumentParser) -> None:
    """What a detector costs: parameters and FLOPs of its modules, and how many images a GPU trains on.

    Everything is counted on this computer, without a GPU.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _ANALYZE_EXAMPLES
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        help="a YAML file, ours or any of Detectron2's, or the name of a model in the zoo",
    )
    parser.add_argument(
        "--config-file", dest="config_option", metavar="CONFIG", help="the same, as other commands have it"
    )
    parser.add_argument(
        "--size",
        metavar="HxW",
        help="of images in pixels (default: what INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST give)",
    )
    parser.add_argument("--no-flops", action="store_true", help="leave out parameters and FLOPs")
    parser.add_argument("--no-fits", action="store_true", help="leave out the images that fit on GPUs")
    parser.add_argument(
        "--inversion", action="store_true", help="error of rebuilding each reversible block's inputs"
    )
    parser.add_argument(
        "--depth", type=int, default=3, metavar="N", help="levels of modules to list (default: 3)"
    )
    out = parser.add_argument_group("output, besides the tables")
    out.add_argument("--json", metavar="FILE")
    out.add_argument("--csv", metavar="FILE")
    out.add_argument("--plot", metavar="FILE", help="the images that fit, as a picture: .png, .pdf or .svg")
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys that override the file's"
    )


# Each command: what adds its arguments, and its line of help. rev_det/cli/NAME.py has run(args) -> exit code.
COMMANDS = {
    "train": (_train, "train or evaluate a detector"),
    "predict": (_predict, "predict on images, folders and videos"),
    "report": (_report, "one HTML page of a training run"),
    "export": (_export, "a trained detector as TorchScript, ONNX or torch.export"),
    "data": (_data, "check and view data in COCO's format"),
    "doctor": (_doctor, "examine the installation"),
    "weights": (_weights, "inspect, convert and check weight files"),
    "classify": (_classify, "classify images, or measure top-1 and top-5 on ImageNet"),
    "bench": (_bench, "memory, FLOPs and time of a training step, ours beside its peers"),
    "analyze": (_analyze, "parameters, FLOPs, and images per GPU of a detector"),
}
_USER_ERROR_CODE = 2
# As shells have it: 128 and the number of the signal.
_INTERRUPTED_CODE, _BROKEN_PIPE_CODE = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; None for the program's own.

    Returns:
        the exit code: 2 after one line ``error: …`` on the standard error stream for what the user can mend,
        130 after Ctrl-C.
    """
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    # Read when torch is imported: threads that wait for work shall sleep, as train_net.py explains.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Names of files need not be UTF-8; what cannot be printed of them is printed as its code.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from rev_det.warning_filters import hide_advice

        hide_advice()
        code = importlib.import_module(f"rev_det.cli.{args.command}").run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return _INTERRUPTED_CODE
    except BrokenPipeError:
        # Who reads has read enough, as `head` does; what is left would fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE_CODE
    except (ValueError, OSError) as error:
        message = str(error)
    except Exception as error:
        message = _obstacle(args.command, error)
        if not message:
            raise
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return _USER_ERROR_CODE


def _parse(words: list[str]) -> argparse.Namespace:
    if words[:1] == ["train"]:
        words.insert(1, "--")
    parser = argparse.ArgumentParser(
        prog="rev-det", description="Reversible vision transformers for Detectron2."
    )
    version = f"rev_det {importlib.metadata.version('rev_det')}"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, summary) in COMMANDS.items():
        description = inspect.getdoc(add_arguments)
        add_arguments(subparsers.add_parser(name, help=summary, description=description))
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands are {', '.join(COMMANDS)}"
        parser.error(f"there is no command {words[0]!r}; {hint}")
    return parser.parse_args(words)


def _obstacle(command: str, error: Exception) -> str:
    """What in the environment stopped a command, and what to do; nothing for a mistake of ours."""
    if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "torchvision"):
        return (
            f"{command} needs {error.name}, which is not installed in {sys.executable}; `make setup` does it"
        )
    from rev_det import modeling
    from rev_det.devices import is_out_of_memory

    try:
        modeling.RevViT  # noqa: B018  (raises what importing Detectron2 has raised, in words)
    except ImportError as obstacle:
        return str(obstacle).replace("rev_det.modeling.RevViT", command)
    if is_out_of_memory(error):
        return f"the memory of this machine does not suffice: {str(error) or 'out of memory'}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
