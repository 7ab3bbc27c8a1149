"""What `pip install` brings: the whole package, and with it jax and optax alone."""

import ast
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from occ import tasks
from occ.extras import require

ROOT = pathlib.Path(__file__).parent.parent
NEED_TRAIN = ["evaluation", "generation", "models", "objectives", "tasks", "training"]
# jax itself brings scipy.
HEAVY = {"chex", "flax", "jaxtyping", "orbax-checkpoint", "reasoning-gym", "tensorflow-datasets"}

INSPECT = f"""
import importlib, json, pathlib
from importlib import metadata
import occ, occ.theory

def message(name):
    try:
        importlib.import_module(name)
    except ImportError as error:
        return str(error)

folder = pathlib.Path(occ.__file__).parent
print(json.dumps({{
    "installed": [d.name.lower().replace("_", "-") for d in metadata.distributions()],
    "requires": [r for r in metadata.requires("occ-jax") if "extra ==" not in r],
    "messages": {{name: message("occ." + name) for name in {NEED_TRAIN}}},
    "files": [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()],
}}))
"""


def run(*command, folder):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Outside the checkout: a fresh environment into which its package is installed."""
    folder = tmp_path_factory.mktemp("core")
    run(sys.executable, "-m", "venv", folder / "venv", folder=folder)
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "-q"]
    try:
        run(*pip, "--dry-run", "--no-deps", "--retries", "1", "optax", folder=folder)
    except AssertionError as error:
        reason = f"pip reaches no package index:\n{error}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    # Of a copy, so that nothing is built in the checkout, nor from what was built there before.
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "occ", source / "occ", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    run(*pip, "--no-compile", source, folder=folder)
    shutil.rmtree(source)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads(run(folder / "venv" / "bin" / "python", "-c", INSPECT, folder=folder))


@pytest.mark.slow
def test_the_core_brings_jax_and_optax_alone(found):
    required = {re.match(r"[\w.-]+", requirement)[0] for requirement in found["requires"]}
    assert required == {"jax", "optax"}
    assert {"occ-jax", "jax", "optax"} <= set(found["installed"])
    assert not HEAVY & set(found["installed"])


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package(found):
    expected = {p.relative_to(ROOT / "occ").as_posix() for p in (ROOT / "occ").rglob("*.py")}
    actual = {name for name in found["files"] if "__pycache__" not in name}
    assert actual == expected | {"py.typed"}


@pytest.mark.slow
def test_the_optax_example_of_the_readme_runs_on_the_core(folder):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    [example] = [block for block in blocks if "occ.calibrate(" in block]
    (folder / "example.md").write_text(example, "utf-8")
    python = folder / "venv" / "bin" / "python"
    options = ["-v", "-o", "NORMALIZE_WHITESPACE", "-o", "ELLIPSIS"]
    output = run(python, "-m", "doctest", *options, "example.md", folder=folder)
    assert f"{example.count('>>> ')} passed" in output


@pytest.mark.slow
@pytest.mark.parametrize("name", NEED_TRAIN)
def test_on_the_core_a_subpackage_names_its_extra(found, name):
    message = found["messages"][name]
    assert message is not None and message.startswith(f"occ.{name} needs ")
    assert message.endswith("pip install 'occ-jax[train]'.")


def test_require_names_what_is_missing_alone():
    require("train", "occ.models", "jax")
    with pytest.raises(ImportError) as caught:
        require("data", "occ.tasks.datasets", "jax", "missing_a", "missing_b")
    assert caught.value.name == "missing_a"
    assert str(caught.value) == (
        "occ.tasks.datasets needs missing_a, missing_b, not installed: pip install 'occ-jax[data]'."
    )


SETUP = (ROOT / "setup.py").read_text("utf-8")
IN_TRAIN = {
    "absl", "chex", "etils", "flax", "jax", "jaxlib", "jaxtyping", "numpy", "optax", "orbax",
    "ml_dtypes", "reasoning_gym", "scipy", "tensorflow_datasets", "tensorstore",
}  # fmt: skip
ASKED_BEFORE = {
    "occ/buckets/store.py": "paths asks for it",
    "occ/tasks/symbolic.py": "runs in a process of its own, which tasks.load asks for",
    "occ/tasks/chat_rendering.py": "runs in a process of its own, which chat_template asks for",
}


def asks(file):
    """Modules that calls of `require` in a file look for, with line and extras."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            extras, _, *modules = (getattr(argument, "value", "") for argument in node.args)
            for module in modules:
                yield module, node.lineno, str(extras).split(",")


def test_a_module_asks_for_the_extra_of_what_it_imports():
    """Or a package around it does: a raw ModuleNotFoundError says nothing of the extra."""
    bare = []
    for file in (ROOT / "occ").rglob("*.py"):
        name = file.relative_to(ROOT).as_posix()
        if "engines/server" in name or name in ASKED_BEFORE:
            continue
        around = [p / "__init__.py" for p in file.parents if (p / "__init__.py").exists()]
        known = {*sys.stdlib_module_names, *IN_TRAIN, "occ"}
        known |= {module for above in around for module, _, _ in asks(above)}
        text = file.read_text("utf-8")
        looked_for = set(re.findall(r'find_spec\("(\w+)"\)', text))
        before = {module: line for module, line, _ in asks(file)}
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            tops = {one.split(".")[0] for one in names} - known - looked_for
            for top in tops:
                # What a function imports, its module may ask for in another.
                late = not node.col_offset and before.get(top, 0) >= node.lineno
                if top not in before or late:
                    bare.append(f"{name}, line {node.lineno}: {top}")
    assert not bare


def test_the_extra_that_is_named_has_what_is_missing():
    listed = {
        extra.lower(): {re.match(r"[\w-]+", item)[0].replace("-", "_") for item in items}
        for extra, text in re.findall(r"^([A-Z]+) = \[(.*?)\]$", SETUP, re.S | re.M)
        for items in [re.findall(r'"([^"]+)"', text)]
    }
    names = {"orbax": "orbax_checkpoint"}  # a module's distribution, where it has another name
    found = 0
    for file in (ROOT / "occ").rglob("*.py"):
        for module, line, extras in asks(file):
            if not set(extras) <= set(listed):  # of a doctest, or handed on
                continue
            there = {*listed["train"], *(item for extra in extras for item in listed[extra])}
            assert names.get(module, module) in there, f"{file} line {line}: {module} in {extras}"
            found += 1
    assert found > 20


def test_tasks_of_mathematics_name_their_extras(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"task 'math' needs .*mpmath.*'occ-jax\[data,math\]'"):
        tasks.load("math")
