"""The package's shape: who may import whom, how long files are, what only one file may name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parent.parent / "megatron_mup"
_FILES = sorted(_PACKAGE.rglob("*.py"))
_NAMES = [str(path.relative_to(_PACKAGE)) for path in _FILES]

# A module imports from its own layer's package, from the same layer, or from a lower one.
LAYERS = [
    {
        "__init__",
        "command_help",
        "errors",
        "exit_codes",
        "os_processes",
        "platform",
        "rank_outcomes",
        "revision",
        "secrets",
    },
    {"parameterization"},
    {
        "config",
        "config_io",
        "config_reference",
        "describe",
        "flops",
        "memory",
        "preset_report",
        "run_source",
    },
    {"model", "optimizer", "data", "megatron_args"},
    {"training", "checkpoint", "doctor", "library", "status"},
    {
        "diagnostics",
        "transfer",
        "benchmark",
        "convert",
        "dry_run",
        "generation",
        "generation_command",
        "launching",
        "planning",
        "dry_run_report",
        "status_report",
    },
    {"cli", "__main__"},
]
# One table each, read as a whole; the hard limit is 650 lines.
LONG_FILES: set[str] = set()


def layer_of(name: str) -> int:
    layers = [number for number, names in enumerate(LAYERS) if name in names]
    assert len(layers) == 1, f"give megatron_mup.{name} a place in LAYERS"
    return layers[0]


def top_level(path: Path) -> str:
    """First part of a module's path below the package, without suffix."""
    return path.relative_to(_PACKAGE).with_suffix("").parts[0]


def imported_parts(tree: ast.AST) -> set[str]:
    """First parts below megatron_mup of everything that a module imports from the package."""
    found = set()
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # The files beside exported weights: transformers finds a neighbour by this import.
            if node.level == 1 and node.module == "configuration_megatron_mup":
                continue
            assert node.level == 0, "imports are absolute"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "megatron_mup":
                is_module = (_PACKAGE / parts[1]).is_dir() or (_PACKAGE / f"{parts[1]}.py").exists()
                found.add(parts[1] if is_module else "__init__")
    return found


def parsed(name: str) -> ast.Module:
    return ast.parse((_PACKAGE / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", _NAMES)
def test_imports_point_down_the_layers(name: str) -> None:
    own = layer_of(top_level(_PACKAGE / name))
    upward = {part for part in imported_parts(parsed(name)) if layer_of(part) > own}
    assert upward == set()


def test_errors_and_platform_import_nothing_of_the_package_but_each_other() -> None:
    for name in ("errors.py", "exit_codes.py", "os_processes.py", "platform.py"):
        assert imported_parts(parsed(name)) <= {"errors", "exit_codes", "platform"}


@pytest.mark.parametrize(
    "module",
    [
        "megatron_mup.parameterization.table",
        "megatron_mup.parameterization.rules",
        "megatron_mup.config_io",
    ],
)
def test_the_science_and_the_configuration_load_neither_torch_nor_megatron(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules, 'megatron' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=_PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == ["False", "False"]


def test_one_file_of_the_product_names_the_deprecated_model_class() -> None:
    naming = set()
    for name in _NAMES:
        for node in ast.walk(parsed(name)):
            names = [node.id] if isinstance(node, ast.Name) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom):
                names += [alias.name for alias in node.names]
            if "GPTModel" in names:
                naming.add(name)
    # The benchmark's contestant is upstream's own model, built without this package's.
    assert naming == {"model/gpt.py", "benchmark/contestants.py"}


@pytest.mark.parametrize("name", _NAMES)
def test_files_stay_short_and_say_what_they_own(name: str) -> None:
    text = (_PACKAGE / name).read_text(encoding="utf-8")
    assert text.isascii()
    assert len(text.splitlines()) <= (650 if name in LONG_FILES else 400)
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("name", _NAMES)
def test_functions_fit_on_a_screen(name: str) -> None:
    sizes = [
        (node.name, (node.end_lineno or 0) - node.lineno + 1)
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [item for item in sizes if item[1] > 40] == []


def test_packages_that_import_megatron_prepare_the_platform_first() -> None:
    for package in ("diagnostics", "library", "model", "optimizer", "training"):
        text = (_PACKAGE / package / "__init__.py").read_text(encoding="utf-8")
        assert "platform.prepare()" in text, package
