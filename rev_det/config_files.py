"""The config that a command line means, by its path or its name in the zoo; read without running code."""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import yaml
from detectron2.config import CfgNode, get_cfg

from . import model_zoo
from .config import add_rev_det_config

_TAGS = "tag:yaml.org,2002:"  # what "!!" is short for
# The only expression in Detectron2's own configs, Base-RetinaNet.yaml, without its spaces; and its value.
_RETINANET_SIZES = "[[x,x*2**(1.0/3),x*2**(2.0/3)]forxin[32,64,128,256,512]]"
_RETINANET_VALUE = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]


def find_config_file(name: str) -> str:
    """The path of a config.

    Args:
        name: path of a YAML file, or name of a model in rev_det's zoo; a file that is there comes first.

    Raises:
        FileNotFoundError: there is neither such a file nor such a model; the message has similar names.
    """
    if os.path.isfile(name):
        return name
    try:
        return model_zoo.get_config_file(name)
    except ValueError as error:
        there = "is a folder" if os.path.isdir(name) else "does not exist"
        raise FileNotFoundError(f"--config-file {name} {there}, and {error}") from error


def default_config() -> CfgNode:
    """Detectron2's keys and rev_det's, with their defaults."""
    cfg = get_cfg()
    add_rev_det_config(cfg)
    return cfg


def read_config_file(path: str) -> CfgNode:
    """The defaults, with the values of a file and of those that it is based on.

    Detectron2's own ``merge_from_file`` runs what a file asks for (``!!python/object/apply:os.system``).

    Args:
        path: of a YAML file with keys of Detectron2 and rev_det.

    Raises:
        OSError: the file, or one that ``_BASE_`` names, cannot be read.
        ValueError: a file is not YAML or would run code, a key does not exist, or a value is of a wrong type.
    """
    defaults = default_config()
    cfg = _SafeConfig(defaults)
    try:
        cfg.merge_from_file(path)
    except KeyError as error:
        # yacs: "Non-existent config key: A.B".
        key = error.args[0].split(": ")[-1]
        raise ValueError(f"{path}: {unknown_key(key, config_keys(defaults))}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a valid config: it is based on itself, or nested deeply") from error
    except (AttributeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a valid config: {error}") from error
    return CfgNode(cfg)


def load_yaml(file: str | IO[str], name: str) -> Any:
    """Read YAML that holds plain values and tuples alone.

    Args:
        file: the text, or what it is read from.
        name: what messages call it.

    Raises:
        ValueError: it is not YAML, or has other tags, which could run code.
    """
    try:
        return yaml.load(file, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"line {error.problem_mark.line + 1} of {name}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not a text file in YAML: {error}") from error


def config_keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    """All keys of a config, such as MODEL and MODEL.DEVICE."""
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, type(node)):
            yield from config_keys(value, f"{prefix}{key}.")


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots, and their values; a tuple is a list, which is what a file has of it."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _as_lists(value)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that is not ``known``."""
    similar = difflib.get_close_matches(key, sorted(known), n=1)
    return f"there is no config key {key}" + (f"; did you mean {similar[0]}?" if similar else "")


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


class _SafeConfig(CfgNode):
    """A config into which files are merged as plain values, those of ``_BASE_`` included."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        # Detectron2 reads the result once more; tuples have become lists, which yacs takes for them.
        with super()._open_cfg(filename) as file:
            content = load_yaml(file, filename)
        if not isinstance(content, dict):
            raise ValueError(f"{filename} holds a {type(content).__name__}, not keys and values")
        return io.StringIO(yaml.safe_dump(content))


class _Loader(yaml.SafeLoader):
    """Plain values and tuples; of expressions the one that Detectron2's RetinaNet configs have."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and key.value in seen:
                # YAML's readers would forget the first one, and a block of keys with it.
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice; make them one", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def _tuple(loader: _Loader, node: yaml.Node) -> tuple:
    return tuple(loader.construct_sequence(node, deep=True))


def _known_expression(loader: _Loader, node: yaml.Node) -> Any:
    words = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else ()
    if len(words) == 1 and "".join(str(words[0]).split()) == _RETINANET_SIZES:
        return _RETINANET_VALUE
    return _refuse(loader, node)


def _refuse(loader: _Loader, node: yaml.Node) -> Any:
    tag = node.tag.replace(_TAGS, "!!")
    raise yaml.constructor.ConstructorError(
        problem=f"the tag {tag} is not followed, since tags can run code; write the value itself",
        problem_mark=node.start_mark,
    )


_Loader.add_constructor(f"{_TAGS}python/tuple", _tuple)
_Loader.add_constructor(f"{_TAGS}python/object/apply:eval", _known_expression)
_Loader.add_constructor(None, _refuse)
