"""One strict session for all tests: eight CPU devices, no silent promotion, shapes checked.

With OCC_TEST_PLATFORM=cuda (or tpu) they run on an accelerator: choose those that need no mesh.

Warnings are errors (pyproject.toml), ranks and dtypes are never promoted in silence, and every
jaxtyping signature of the packages listed here is checked by beartype at run time. Optax's Adam
computes `decay ** count` with an integer count, which strict dtype promotion forbids: a test that
runs it carries the mark `standard_promotion`.
"""

import atexit
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# What several tests compile, or the processes that a test starts, is compiled once a session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="occ-compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# Programs of tests run once, so compiling them is what they cost: the newer code generator for CPUs
# takes a quarter more time, and so does code in pieces for several cores, which have tests of their
# own. A later XLA may not know these flags, and would abort.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if QUICK not in os.environ.get("XLA_FLAGS", ""):
    flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
    try_it = [sys.executable, "-c", "import jax; jax.devices()"]
    with_flag = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    if not subprocess.run(try_it, env=with_flag, capture_output=True, check=False).returncode:
        os.environ["XLA_FLAGS"] = flags

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # experiments/ is not installed

PLATFORM = os.environ.get("OCC_TEST_PLATFORM", "cpu")
jax.config.update("jax_platforms", PLATFORM if PLATFORM == "cpu" else f"{PLATFORM},cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", PLATFORM == "cpu")
if PLATFORM != "cpu":  # where float32 products have ten bits otherwise
    jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A reference in torch, which doctest would import; the extra parity has it.
collect_ignore = [] if importlib.util.find_spec("torch") else ["reference_torch.py"]

CHECKED = ["occ.objectives", "occ.models", "occ.generation", "occ.evaluation"]
# Not the two trees of training: jax fills them with shapes, shardings and numpy arrays as well.
CHECKED += [
    "occ.training.gradient",
    "occ.training.metrics",
    "occ.training.step",
    "occ.training.rollout",
    "occ.training.score",
]
install_import_hook(CHECKED, "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def _several_devices():
    """A sharding test on one device would pass empty."""
    assert len(jax.devices("cpu")) == 8


@pytest.fixture(autouse=True)
def _strict_dtype_promotion(request):
    if request.node.get_closest_marker("standard_promotion"):
        yield
    else:
        with jax.numpy_dtype_promotion("strict"):
            yield


@pytest.fixture
def unchecked():
    """Without run-time type checks, as users run it: for the project's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def x64():
    """Runs a test in float64, for comparisons with slow references."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def verifier():
    """Of mathematical answers; each module's own, so that none gets another's worn workers."""
    from occ.tasks.math_task import MathVerifier
    from occ.tasks.workers import Limits

    with MathVerifier(limits=Limits(cpu_seconds=2.0)) as verifier:
        yield verifier
