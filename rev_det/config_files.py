"""The one reader of configs: files and what they are based on, then KEY VALUE pairs; no code is run."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .config import add_rev_det_config
from .rules import value_of

_TAGS = "tag:yaml.org,2002:"  # what "!!" is short for
# The only expression in Detectron2's own configs, Base-RetinaNet.yaml, without its spaces; and its value.
_RETINANET_SIZES = "[[x,x*2**(1.0/3),x*2**(2.0/3)]forxin[32,64,128,256,512]]"
_RETINANET_VALUE = [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)]


def default_config() -> CfgNode:
    """Detectron2's keys and rev_det's, with their defaults."""
    cfg = get_cfg()
    add_rev_det_config(cfg)
    return cfg


def read_config_file(path: str, opts: Sequence[str] = ()) -> CfgNode:
    """The defaults, with the values of a file and of those that it is based on, and of a command line.

    Detectron2's own ``merge_from_file`` runs what a file asks for (``!!python/object/apply:os.system``).

    Args:
        path: of a YAML file with keys of Detectron2 and rev_det.
        opts: keys and values that override the file's, alternating.

    Raises:
        OSError: the file, or one that ``_BASE_`` names, cannot be read.
        ValueError: a file is not YAML or would run code, a key does not exist, or a value is of a wrong type.
    """
    defaults = default_config()
    known = list(config_keys(defaults))
    _check_pairs(opts, known)
    if path.endswith(".py"):
        raise ValueError(
            f"{path} is a LazyConfig, which Detectron2's own script trains: "
            f"python tools/lazyconfig_train_net.py --config-file {path}"
        )
    content = _load_with_bases(path)
    _check_nodes(path, content, defaults)

    class Loaded(CfgNode):
        @classmethod
        def load_yaml_with_base(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return content

    cfg = Loaded(defaults)
    try:
        cfg.merge_from_file(path)
    except KeyError as error:
        # yacs: "Non-existent config key: A.B".
        raise ValueError(f"{path}: {unknown_key(error.args[0].split(': ')[-1], known)}") from error
    except (AttributeError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a valid config: {error}") from error
    cfg = CfgNode(cfg)
    for key in known:
        if _is_wrongly_none(cfg, key, defaults):
            raise ValueError(f"{path}: {_wrong_type(key, None, value_of(defaults, key))}")
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        before = value_of(cfg, key)
        try:
            cfg.merge_from_list([key, text])
        except ValueError as error:
            raise ValueError(_wrong_type(key, text, before)) from error
        if _is_wrongly_none(cfg, key, defaults):
            raise ValueError(_wrong_type(key, text, before))
    return cfg


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
        raise ValueError(f"{name} is not a text file in YAML: {getattr(error, 'reason', error)}") from error


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


def _load_with_bases(path: str, derived: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of a file, or URL, over that of those it names under ``_BASE_``."""
    named = f"_BASE_ of {derived[-1]}: {path}" if derived else path
    if path in derived:
        raise ValueError(f"{path} is not a valid config: it is based on itself")
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"{named} {why_no_file(path)}")
    try:
        with open(PathManager.get_local_path(path), encoding="utf-8") as file:
            content = load_yaml(file, path)
    except RecursionError as error:
        raise ValueError(f"{path} is not a valid config: it is nested too deeply") from error
    except OSError as error:
        raise OSError(f"{named} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not keys and values")
    bases = content.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"_BASE_ of {path} must be the path or URL of a config, or a list; got {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        if "://" not in base:
            base = os.path.normpath(os.path.join(os.path.dirname(path), os.path.expanduser(base)))
        _put_over(merged, _load_with_bases(base, (*derived, path)))
    _put_over(merged, content)
    return merged


def why_no_file(path: str) -> str:
    """What to say of a path that is not that of a file."""
    if os.path.isdir(path):
        return "is a folder, not a file"
    return "is not a file" if os.path.lexists(path) else "does not exist"


def _put_over(base: dict[Any, Any], own: Mapping[Any, Any]) -> None:
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _put_over(base[key], value)
        else:
            base[key] = value


def _check_nodes(path: str, content: Mapping[Any, Any], defaults: CfgNode, prefix: str = "") -> None:
    """Check that what should hold keys does, and that these are names."""
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"{path}: {key!r} is not the name of a config key")
        if isinstance(node := defaults.get(key), CfgNode):
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}: {_wrong_type(f'{prefix}{key}', value, node)}")
            _check_nodes(path, value, node, f"{prefix}{key}.")


def _check_pairs(opts: Sequence[str], known: Sequence[str]) -> None:
    if misplaced := [word for word in opts if word.startswith("--")]:
        raise ValueError(
            f"{misplaced[0]} comes after the first KEY VALUE pair; options come before all of them"
        )
    if len(opts) % 2:
        pairs = itertools.zip_longest(opts[::2], opts[1::2])
        lone = next((key for key, value in pairs if key in known and (value is None or value in known)), None)
        problem = f"{lone} has no value" if lone else f"{len(opts)} words are given: {' '.join(opts)}"
        raise ValueError(f"config keys and values must alternate, but {problem}")
    for key in opts[::2]:
        if key not in known:
            raise ValueError(unknown_key(key, known))


def _is_wrongly_none(cfg: CfgNode, key: str, defaults: CfgNode) -> bool:
    """yacs lets None pass for any value; it means something where it is the default, or WEIGHT_DECAY's."""
    has_meaning = value_of(defaults, key) is None or key.startswith("SOLVER.WEIGHT_DECAY_")
    return value_of(cfg, key) is None and not has_meaning


def _wrong_type(key: str, found: Any, value: Any) -> str:
    """What to say of what was ``found`` where something like ``value`` should be."""
    if isinstance(value, CfgNode):
        return f"{key} holds other keys, such as {key}.{next(iter(value))}; set those, got {found!r}"
    problem = f"{key} must be of type {type(value).__name__}, such as {value!r}; got {found!r}"
    if isinstance(value, tuple | list):
        return f'{problem}. On a command line, in quotes, as {key} "{value!r}"'
    return problem


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
