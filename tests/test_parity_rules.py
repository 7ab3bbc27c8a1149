"""Rules against an implementation of the same methods by others, torchjd (extra `parity`).

Its weightings are functions of the same Gram matrix. They know no main gradient, so what is
compared are the rules that treat all gradients alike.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ import rules
from occ.measures import Measurement
from occ.rules import projection

EXTRA = "not installed; pip install -e '.[parity]' compares the rules with those of torchjd"
torch = pytest.importorskip("torch", reason=f"torch is {EXTRA}")
aggregation = pytest.importorskip("torchjd.aggregation", reason=f"torchjd is {EXTRA}")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.usefixtures("x64"),
    # torchjd's Nash-MTL, of its own convex program.
    pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP"),
]

every_size = pytest.mark.parametrize("heads", [1, 2, 3])
every_seed = pytest.mark.parametrize("seed", range(8))


def vectors(seed, heads, size=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(heads + 1, size)) * np.exp(0.5 * rng.normal(size=(heads + 1, 1)))


def weigh(rule, gram, key=None):
    key = jax.random.key(0) if key is None else key
    weights, _ = rule.update(Measurement(jnp.asarray(gram)), rule.init(len(gram) - 1), key)
    return np.asarray(weights)


def theirs(weighting, gram):
    return weighting(torch.tensor(gram)).numpy()


class Orders:
    """Stands in for torch.randperm, so that both draw the same orders."""

    def __init__(self, orders, skip_self):
        self.rows = [[int(j) for j in row] for row in orders]
        self.skip_self = skip_self
        self.row = 0

    def __call__(self, count):
        i, self.row = self.row, self.row + 1
        order = self.rows[i]
        if self.skip_self:  # positions in the list of the others
            others = [j for j in range(len(self.rows)) if j != i]
            order = [others.index(j) for j in order if j != i]
        assert len(order) == count
        return torch.tensor(order)


@every_size
@every_seed
def test_pcgrad(monkeypatch, seed, heads):
    rows, key = vectors(seed, heads, size=3), jax.random.key(seed)
    gram = rows @ rows.T
    orders = Orders(projection._orders(key, heads + 1), skip_self=False)
    monkeypatch.setattr(torch, "randperm", orders)
    expected = theirs(aggregation.PCGradWeighting(), gram)
    np.testing.assert_allclose(weigh(rules.pcgrad(), gram, key), expected, rtol=1e-10)


@every_size
@every_seed
def test_gradvac_over_several_steps(monkeypatch, seed, heads):
    rule, other = rules.gradvac(decay=0.6), aggregation.GradVacWeighting(beta=0.4, eps=0.0)
    state = rule.init(heads)
    for step in range(5):
        # The first steps agree, which raises the targets.
        rows = vectors(10 * seed + step, heads) + (1.5 if step < 3 else 0.0)
        gram, key = rows @ rows.T, jax.random.key(step)
        orders = Orders(projection._orders(key, heads + 1), skip_self=True)
        monkeypatch.setattr(torch, "randperm", orders)
        weights, state = rule.update(Measurement(jnp.asarray(gram)), state, key)
        np.testing.assert_allclose(weights, theirs(other, gram), rtol=1e-9)


@every_seed
def test_mgda_of_two_gradients(seed):
    rows = vectors(seed, 1)
    expected = theirs(aggregation.MGDAWeighting(), rows @ rows.T)
    np.testing.assert_allclose(weigh(rules.mgda(), rows @ rows.T), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [2, 3])
@every_seed
def test_mgda_of_several_is_what_their_iteration_approaches(seed, heads):
    """Frank-Wolfe converges slowly, so the lengths are compared, and ours must not be longer."""
    rows = vectors(seed, heads)
    gram = rows @ rows.T
    ours = weigh(rules.mgda(), gram)
    iterated = theirs(aggregation.MGDAWeighting(epsilon=1e-9, max_iters=1000), gram)
    gap = iterated @ gram @ iterated - ours @ gram @ ours
    assert -1e-14 * np.trace(gram) < gap < 1e-3 * np.trace(gram)


@pytest.mark.parametrize("radius", [0.2, 0.5, 0.9])
@every_size
@every_seed
def test_cagrad(seed, heads, radius):
    """Their solver stops at a tolerance, and ours must not be worse for the worst-off objective."""
    rows = vectors(seed, heads)
    gram = rows @ rows.T
    ours = weigh(rules.cagrad(radius), gram)
    expected = theirs(aggregation.CAGradWeighting(c=radius), gram)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)
    assert (gram @ ours).min() >= (gram @ expected).min() - 1e-5 * np.trace(gram)


@every_size
@every_seed
def test_imtl_g(seed, heads):
    rows = vectors(seed, heads)
    expected = theirs(aggregation.IMTLGWeighting(), rows @ rows.T)
    np.testing.assert_allclose(weigh(rules.imtl_g(), rows @ rows.T), expected, rtol=1e-9)


@every_size
@every_seed
def test_aligned_mtl(seed, heads):
    """They average the aligned gradients, the rule sums them."""
    rows = vectors(seed, heads)
    expected = (heads + 1) * theirs(aggregation.AlignedMTLWeighting(), rows @ rows.T)
    np.testing.assert_allclose(weigh(rules.aligned_mtl(), rows @ rows.T), expected, rtol=1e-10)


@every_size
def test_nash_mtl_where_their_approximation_solves_its_equation(heads):
    solved = 0
    for seed in range(5):
        rows = vectors(seed, heads)
        gram = rows @ rows.T
        other = aggregation.NashMTL(n_tasks=heads + 1, max_norm=0.0, optim_niter=100)
        expected = other.weighting(torch.tensor(rows)).numpy()
        if np.abs(gram @ expected * expected - 1).max() > 1e-4:
            continue
        solved += 1
        ours = weigh(rules.nash_mtl(relative_ridge=0.0), gram)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert solved >= 3
