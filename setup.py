"""Installs the package `occ` alone; experiments, tests and notebooks run from a checkout."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "occ" / "__init__.py").read_text(encoding="utf-8"), re.M
)[1]

EXPERIMENTS = [
    "matplotlib",
    "reasoning-gym",
    "tensorboardX",
    "tqdm",
    "tyro",
]
MATH = ["math-verify", "mpmath"]
DATA = ["grain", "pyarrow", "requests"]  # published problems; no TensorFlow
TEST = [
    "beartype",
    "hypothesis",
    "mypy",
    "pytest",
    "pytest-xdist",
    "ruff",
]
NOTEBOOKS = ["ipykernel", "matplotlib", "nbclient", "nbmake"]
PLAN = ["jax[tpu]"]  # the TPU compiler; no TPU needed
PARITY = ["accelerate", "torch", "torchjd[cagrad,nash-mtl]", "transformers"]
PRETRAINED = ["gguf", "jinja2>=3.1.6", "safetensors", "tokenizers"]  # older Jinjas leak

setuptools.setup(
    name="occ-jax",
    version=VERSION,
    description="Joint training of multi-token prediction in RL by optimal coefficient calibration",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["occ", "occ.*"]),
    package_data={"occ": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "chex",
        "flax>=0.12",
        "jax>=0.8",
        "jaxtyping",
        "numpy",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "scipy",
        "tensorflow-datasets",
    ],
    extras_require={
        "experiments": EXPERIMENTS,
        "data": DATA,
        "math": MATH,
        "test": EXPERIMENTS + DATA + MATH + PRETRAINED + TEST + NOTEBOOKS,
        "notebooks": EXPERIMENTS + NOTEBOOKS,
        "parity": PARITY,
        "plan": EXPERIMENTS + PLAN,
        "pretrained": PRETRAINED,
    },
)
