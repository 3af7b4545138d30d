"""The installer behind ``make setup``, loaded from its file: it is not part of the package."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup_env = load()
REQUIRES, EXTRAS = setup_env.read_requirements(ROOT / "setup.py")
