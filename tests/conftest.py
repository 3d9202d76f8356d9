"""Fixtures several test files share. Heavy imports stay inside, so light tests stay quick."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tests/tiny.py: `make_model(folder, ...)` and `make_tokenizer(...)`.

    Loaded by file, because --import-mode=importlib keeps tests/ off sys.path.
    """
    if "siftline_tests_tiny" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "siftline_tests_tiny", Path(__file__).with_name("tiny.py")
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["siftline_tests_tiny"] = module
        spec.loader.exec_module(module)
    return sys.modules["siftline_tests_tiny"]


@pytest.fixture(scope="session")
def tiny_model(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a random 50,000-parameter Llama and a byte-level tokenizer.

    Shared by the session: read only. A test that changes files makes its own with `tiny`.
    """
    folder: Path = tiny.make_model(tmp_path_factory.mktemp("tiny") / "model")
    return folder
