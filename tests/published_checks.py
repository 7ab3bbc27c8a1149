"""What tests of published checkpoints compare: bits, and logits with those by others' code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from occ.models.decoder import Decoder, merge_model, split_model
from occ.models.pretrained.folder import WeightFolder
from tests.make_published_logits import FILE
from tests.published import TOKENS

TOLERANCE = 1e-5  # norm-wise, in float32
EXPECTED = load_file(FILE)


def stored(folder):
    """Every tensor: shape, dtype and bytes."""
    files = WeightFolder(folder)
    return {
        name: (info.shape, info.dtype, files.read(name).tobytes())
        for name, info in files.tensors.items()
    }


def logits(model):
    graphdef, *_ = split_model(nnx.eval_shape(lambda: Decoder(model.config, nnx.Rngs(0))))
    time = TOKENS.shape[1]
    positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), TOKENS.shape)
    inputs = jnp.asarray(TOKENS), positions, jnp.ones(TOKENS.shape, jnp.int32)
    return _logits(graphdef, model.params, model.rest, inputs)


@jax.jit(static_argnums=0)
def _logits(graphdef, params, rest, inputs):
    return merge_model(graphdef, params, rest)(*inputs)


def errors(model, name):
    """Norm-wise error of the main logits and of the module's, against those by others' code."""
    main, ahead = logits(model)
    found = [error(main, EXPECTED[f"{name}/main"])]
    if f"{name}/module" in EXPECTED:
        found.append(error(ahead[0, :, :-1], EXPECTED[f"{name}/module"]))
    return found


def error(actual, expected):
    assert actual.shape == expected.shape
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


def configured(model, **mtp):
    """The same weights, with other fields of MTPConfig."""
    changed = dataclasses.replace(model.config.mtp, **mtp)
    return model.replace(config=dataclasses.replace(model.config, mtp=changed))
