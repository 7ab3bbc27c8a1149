"""Plain layers: dtypes of sums and of gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from occ.models.layers import at_least_float32, vocabulary_product
from tests import tiny


def test_at_least_float32(x64):
    assert at_least_float32(jnp.dtype("bfloat16")) == jnp.float32
    assert at_least_float32(jnp.dtype("float64")) == jnp.float64


def test_a_narrow_product_with_the_vocabulary_has_a_wide_gradient():
    """Exact sums of the rounded factors, where autodiff would round the sum to bfloat16."""
    rng = np.random.default_rng(0)
    wide = [rng.normal(size=shape).astype(np.float32) for shape in ((2, 9, 8), (8, 5), (2, 9, 5))]
    x, kernel, cotangent = (np.asarray(jnp.bfloat16(values), np.float32) for values in wide)
    bfloat16 = jnp.dtype("bfloat16")
    product, pull = jax.vjp(
        lambda x, kernel: vocabulary_product(x, kernel, bfloat16), jnp.bfloat16(x), kernel
    )
    assert product.dtype == jnp.float32
    tiny.close(product, x @ kernel, 1e-6)
    to_x, to_kernel = pull(jnp.asarray(cotangent))
    assert (to_x.dtype, to_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    tiny.close(to_x, cotangent @ kernel.T, 5e-3)
    tiny.close(to_kernel, np.einsum("btd,btv->dv", x, cotangent), 1e-6)
