"""Models against transformers' on the same files, and MTP modules against plain torch.

Random tiny configurations; weights and gradients travel in both directions through safetensors
folders, so that names, transpositions and stacking are tested with the mathematics.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from occ.models import pretrained
from occ.models.decoder import Decoder, merge_model, split_model
from occ.models.pretrained import names
from occ.models.pretrained.folder import WeightFolder
from tests.published import CASES, write_folder
from tests.published_checks import EXPECTED, configured

EXTRA = "not installed; pip install -e '.[parity]' compares models with those of transformers"
torch = pytest.importorskip("torch", reason=f"torch is {EXTRA}")
transformers = pytest.importorskip("transformers", reason=f"transformers is {EXTRA}")

from tests import make_published_logits, reference_torch  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

TOLERANCE = 1e-5  # norm-wise, in float32
TIME = 10
every_case = pytest.mark.parametrize("name", CASES)
with_modules = pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.get("num_nextn_predict_layers")]
)


def error(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def batch(vocab):
    """Two rows, the second with three columns of padding on the left; and a random readout."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, vocab, (2, TIME)).astype(np.int32)
    mask = np.ones((2, TIME), np.int32)
    mask[1, :3] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    return tokens, positions, mask, rng.normal(size=(2, TIME, vocab)).astype(np.float32)


def run(model, inputs, weights, mtp_weights=None):
    """Logits of both heads, and the gradient of their sum weighted by given numbers."""
    graphdef, *_ = split_model(nnx.eval_shape(lambda: Decoder(model.config, nnx.Rngs(0))))
    inputs = [jnp.asarray(column) for column in inputs]

    @jax.jit
    def compute(params, rest):
        def loss(params):
            main, ahead = merge_model(graphdef, params, rest)(*inputs)
            total = jnp.sum(jnp.where(inputs[2][..., None] > 0, main, 0) * weights)
            if mtp_weights is not None:
                total = total + jnp.sum(ahead[0, :, :-1] * mtp_weights)
            return total, (main, ahead)

        return jax.grad(loss, has_aux=True)(params)

    gradient, logits = compute(model.params, model.rest)
    return logits, gradient


def theirs(folder):
    """The model as transformers loads it; nothing but MTP modules may be left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",  # the other one wants rows of multiples of 16 bytes
        dtype=torch.float32,
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    beyond = f"model.layers.{model.config.num_hidden_layers}."
    assert all(name.startswith(("model.mtp_layers.", beyond)) for name in info["unexpected_keys"])
    return model


def without_modules(folder, target):
    """MiMo for transformers, which does not know it: Qwen2 on the same tensors."""
    raw = json.loads((folder / "config.json").read_text())
    if raw["model_type"] == "mimo":
        raw |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    target.mkdir()
    (target / "config.json").write_text(json.dumps(raw))
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    return target


@every_case
def test_logits_and_gradients_are_those_of_transformers(tmp_path, name):
    """Of the published folder, and of the one that is saved, whose config.json is ours."""
    folder = write_folder(tmp_path / "published", name)
    ours = pretrained.load(folder)
    tokens, positions, mask, weights = batch(ours.config.vocab_size)
    (main, _), gradient = run(ours, (tokens, positions, mask), weights)
    pretrained.save(tmp_path / "saved", ours)
    inputs = {
        "attention_mask": torch.tensor(mask),
        "position_ids": torch.tensor(positions).long(),
    }
    present = mask > 0
    for source in (folder, tmp_path / "saved"):
        other = theirs(without_modules(source, tmp_path / f"{source.name}_theirs"))
        expected = other(torch.tensor(tokens).long(), **inputs).logits
        assert error(main[present], expected.detach()[present]) < TOLERANCE
    torch.sum(expected[present] * torch.tensor(weights)[present]).backward()

    # Their loader knows how their parameters are made of tensors: it reads our gradient too.
    pretrained.save(tmp_path / "gradient", ours.replace(params=gradient))
    read = theirs(without_modules(tmp_path / "gradient", tmp_path / "gradient_theirs"))
    given = dict(read.named_parameters())
    for parameter, value in other.named_parameters():
        assert error(given[parameter].detach(), value.grad) < 10 * TOLERANCE, parameter


@every_case
def test_the_logits_that_are_kept_are_still_those_of_others(name):
    for key, value in make_published_logits.logits(name).items():
        assert error(value, EXPECTED[key]) < TOLERANCE, key


def whole_rows(config):
    rng = np.random.default_rng(4)
    shape = (2, TIME)
    tokens = rng.integers(0, config.vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(TIME, dtype=np.int32), shape)
    weights = rng.normal(size=(2, *shape, config.vocab_size)).astype(np.float32)
    inputs = tokens, positions, np.ones(shape, np.int32)
    return inputs, weights[0], weights[1, :, :-1]


@pytest.mark.parametrize(
    ("name", "zero_first"),
    [("mimo", False), ("mimo", True), ("glm", False), ("glm with options", True)],
)
def test_modules_have_the_logits_and_gradients_of_the_definition(tmp_path, name, zero_first):
    folder = write_folder(tmp_path / "published", name)
    ours = configured(pretrained.load(folder), zero_first_embedding=zero_first)
    inputs, weights, mtp_weights = whole_rows(ours.config)
    (main, ahead), gradient = run(ours, inputs, weights, mtp_weights)

    tensors, raw = reference_torch.read(folder)
    for row in range(2):
        tokens = torch.tensor(inputs[0][row]).long()
        expected = reference_torch.logits(tensors, raw, tokens, zero_first=zero_first)
        assert error(main[row], expected[0].detach()) < TOLERANCE
        assert error(ahead[0, row, :-1], expected[1].detach()) < TOLERANCE
        total = (expected[0] * torch.tensor(weights[row])).sum()
        (total + (expected[1] * torch.tensor(mtp_weights[row])).sum()).backward()
    pretrained.save(tmp_path / "gradient", ours.replace(params=gradient))
    found = WeightFolder(tmp_path / "gradient")
    gradients = {key: tensor.grad.numpy() for key, tensor in tensors.items() if has_gradient(key)}
    for copy in names.copies(ours.config):
        if copy.name in gradients:  # one parameter is both
            gradients[copy.original] = gradients[copy.original] + gradients.pop(copy.name)
    assert len(gradients) > 30
    for key, expected in gradients.items():
        assert error(found.read(key), expected) < 10 * TOLERANCE, key
    if raw["model_type"] == "glm4_moe" and not zero_first:
        drafted = drafted_by_transformers(tmp_path / "saved", ours, inputs[0])
        assert error(ahead[0, :, :-1], drafted) < TOLERANCE


def has_gradient(name):
    return not name.endswith("e_score_correction_bias")


def drafted_by_transformers(folder, model, tokens):
    """The module's logits by their class for MTP layers."""
    layers = transformers.modeling_layers
    if not hasattr(layers, "MtpModel"):  # 5.24 has
        pytest.skip(f"transformers {transformers.__version__} has no MtpModel; the rest agrees")
    pretrained.save(folder, model)
    main = theirs(folder)
    # By these patterns it tells the tensors of the published sizes' modules.
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_layers}.*"]
    drafter = layers.MtpModel.from_pretrained(main)
    tokens = torch.tensor(tokens).long()
    with torch.no_grad():
        hidden = main.model(tokens).last_hidden_state[:, :-1]
        places = torch.arange(1, tokens.shape[1]).expand(2, -1)
        state = drafter.forward_layer(0, hidden, places, None, input_ids=tokens[:, 1:])
        return main.lm_head(state)


@with_modules
def test_positions_of_a_module_may_count_from_either_token(tmp_path, name):
    tensors, raw = reference_torch.read(write_folder(tmp_path / "published", name))
    tokens = torch.arange(TIME) % raw["vocab_size"]
    _, here = reference_torch.logits(tensors, raw, tokens)
    _, there = reference_torch.logits(tensors, raw, tokens, shift=1)
    assert error(there.detach(), here.detach()) < TOLERANCE
    _, apart = reference_torch.logits(tensors, raw, tokens, zero_first=True)
    assert error(apart.detach(), here.detach()) > 1e-3
