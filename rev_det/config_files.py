"""The config that a command line means: a file, or a model of the zoo by its name."""

from __future__ import annotations

import os

from . import model_zoo


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
