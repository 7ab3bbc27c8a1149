"""Runs that begin with published weights, and modules that learn from the model's own samples."""

import dataclasses
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import runs
from occ import tasks
from occ.models.policy import Policy
from occ.models.pretrained import PretrainedWarning, read_config, save
from occ.training import loop
from occ.training.config import (
    EvaluationConfig,
    LayoutConfig,
    PretrainedConfig,
    RolloutConfig,
    TrainConfig,
    WarmStartConfig,
)
from occ.training.regimes import regime
from occ.training.sharding import make_mesh, tree_shardings
from occ.training.start import own_samples, starting_point
from occ.training.start.pretrained import folder_of, load_policy, on_pretrained
from tests import published, test_gguf, tiny

TASK = tasks.load("arithmetic", digits=1, train_size=20, test_size=8)
TRUNK = test_gguf.CONFIG
MODEL = dataclasses.replace(TRUNK, mtp=tiny.model_config(1).mtp)
OWN = WarmStartConfig(kind="own_samples", steps=40, batch_size=8, learning_rate=1e-2, pool=32)


def with_weights(path, **changes):
    base = TrainConfig(
        name="pretrained",
        model=MODEL,
        task="arithmetic",
        mtp=regime("occ_paper"),
        pretrained=PretrainedConfig(path=str(path)),
        evaluation=EvaluationConfig(prompts=4, samples=1),
        rollout=RolloutConfig(prompts=4, samples=4, minibatches=2),
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    _, params, _ = tiny.build_model(TRUNK)
    # A model with habits: it repeats some tokens, which can be foreseen.
    rng = np.random.default_rng(1)
    params = jax.tree.map(jnp.asarray, params)
    table = params["embedding"]["embedding"] * jnp.asarray(
        rng.choice([0.3, 4.0], (32, 1)), "float32"
    )
    params = {**params, "embedding": {"embedding": table}}
    path = tmp_path_factory.mktemp("weights") / "tiny.gguf"
    return test_gguf.write(path, test_gguf.tensors_of(params, TRUNK)), params


@pytest.fixture(scope="module")
def programs(weights):
    return loop.build(with_weights(weights[0]), TASK)


@pytest.fixture(scope="module")
def loaded(weights):
    return load_policy(with_weights(weights[0], warm_start=OWN))


# -- weights of others ------------------------------------------------------------------------


def test_the_weights_of_a_file_and_fresh_modules_make_the_model(weights, loaded):
    params, rest = loaded.params, loaded.rest
    modules = params["mtp"]
    chex.assert_trees_all_equal({k: v for k, v in params.items() if k != "mtp"}, weights[1])
    last = jax.tree.map(lambda leaf: leaf[-1], weights[1]["layers"])
    chex.assert_trees_all_equal(modules["0"]["block"], last)
    assert rest == {}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of huggingface_hub with Owner/Name in it; its folder."""
    from huggingface_hub import constants

    commit = "0" * 40
    repository = tmp_path / "models--Owner--Name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots" / commit


@pytest.mark.parametrize("family", ["mimo", "glm", "qwen3", "llama tied, llama3 rope"])
def test_a_run_moves_to_another_published_model(weights, hub, family):
    """By name, out of huggingface_hub's cache: what its files say, and the run's own choices."""
    published.write_folder(hub, family)
    found = read_config(hub)
    own = PretrainedConfig(str(weights[0]), attach="random")
    mine = {"compute_dtype": "bfloat16", "remat": "full", "max_length": 16}
    vocabulary = {"vocab_size": found.vocab_size}
    config = with_weights(
        weights[0],
        model=dataclasses.replace(MODEL, **mine, **vocabulary),
        task_options={"tokenizer": "mine"},
        pretrained=own,
    )
    moved = on_pretrained(config, "Owner/Name")
    mtp = found.mtp if found.mtp.num_modules else MODEL.mtp
    assert moved.model == dataclasses.replace(found, mtp=mtp, **mine)
    assert moved.pretrained == PretrainedConfig("Owner/Name", attach="random")
    assert moved.task_options == config.task_options  # an export of a run has no tokenizer
    assert folder_of(moved) == hub and folder_of(config) is None
    loaded = load_policy(dataclasses.replace(moved, warm_start=OWN))
    assert len(loaded.params["mtp"]) == mtp.num_modules
    # A context that the files do not have is cut.
    longer = dataclasses.replace(config, model=dataclasses.replace(config.model, max_length=10**6))
    assert on_pretrained(longer, "Owner/Name").model.max_length == found.max_length
    other = dataclasses.replace(config, model=dataclasses.replace(MODEL, vocab_size=99))
    with pytest.raises(ValueError, match=r"no tokenizer.json, .* is not that of 'mine' \(99\)"):
        on_pretrained(other, "Owner/Name")
    (hub / "tokenizer.json").write_text("{}")
    assert on_pretrained(other, "Owner/Name").task_options == {"tokenizer": "Owner/Name"}


def test_a_run_moves_to_a_file_and_back(weights, hub):
    published.write_folder(hub, "mimo")
    config = with_weights("elsewhere", pretrained=None)
    assert on_pretrained(config, str(weights[0])) == with_weights(weights[0])
    there = dataclasses.replace(config, task_options={"tokenizer": "mine"})
    assert on_pretrained(there, str(weights[0])).task_options["tokenizer"] == str(weights[0])
    mimo = on_pretrained(config, "Owner/Name").model.mtp
    assert on_pretrained(on_pretrained(config, "Owner/Name"), str(weights[0])).model.mtp == mimo
    with pytest.raises(ValueError, match="hf download Owner/Other"):
        on_pretrained(config, "Owner/Other")


def test_the_buffers_of_experts_stay_the_runs(hub):
    published.write_folder(hub, "glm")
    found = read_config(hub)
    moe = dataclasses.replace(found.moe, capacity_factor=1.25)
    config = with_weights("x", model=dataclasses.replace(found, moe=moe))
    assert on_pretrained(config, "Owner/Name").model.moe == moe


def test_modules_that_nothing_will_warm_up_are_warned_of(weights):
    with pytest.warns(PretrainedWarning, match="NEVER TRAINED"):
        params = load_policy(
            with_weights(weights[0], pretrained=PretrainedConfig(str(weights[0]), "random"))
        ).params
    block, last = params["mtp"]["0"]["block"], params["layers"]
    assert not np.array_equal(block["mlp"]["up"]["kernel"], last["mlp"]["up"]["kernel"][-1])


def test_everything_lies_where_training_wants_it(weights):
    layout = LayoutConfig(fsdp=2, tensor=2)
    config = with_weights(weights[0], layout=layout, warm_start=OWN)
    params = load_policy(config).params
    expected = tree_shardings(params, make_mesh(layout))
    jax.tree.map(
        lambda leaf, sharding: chex.assert_equal(leaf.sharding, sharding), params, expected
    )


def test_a_folder_with_modules_brings_its_own(tmp_path):
    model = dataclasses.replace(MODEL, qkv_bias=True, tied_embeddings=False)
    _, params, rest = tiny.build_model(model)
    save(tmp_path / "folder", Policy(model, params, rest))
    config = with_weights(tmp_path / "folder", model=model)
    chex.assert_trees_all_equal(load_policy(config).params, params)
    other = dataclasses.replace(model, mtp=dataclasses.replace(model.mtp, num_modules=2))
    with pytest.raises(ValueError, match="mtp: .*num_modules=2.* in the configuration"):
        load_policy(dataclasses.replace(config, model=other))


def test_weights_of_another_model_are_refused(weights):
    other = dataclasses.replace(MODEL, width=64, head_dim=16)
    with pytest.raises(ValueError, match="width: 64 in the configuration, 32 in the files"):
        load_policy(with_weights(weights[0], model=other))
    with pytest.raises(ValueError, match="no file or folder 'nowhere'"):
        load_policy(with_weights("nowhere"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PretrainedConfig("x", attach="first_block"), "attach must be one of"),
        (lambda: WarmStartConfig(kind="answers"), "kind must be one of"),
        (lambda: WarmStartConfig(pool=0), "pool must be > 0"),
        (
            lambda: with_weights("x", model=TRUNK, mtp=regime("rl_only"), warm_start=OWN),
            "trains MTP modules, and there are none",
        ),
        (
            lambda: with_weights(
                "x",
                layout=LayoutConfig(data=4),
                warm_start=dataclasses.replace(OWN, batch_size=6),
            ),
            "batch_size .6. .* 4 devices",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- own samples ------------------------------------------------------------------------------


def test_the_gradient_is_that_of_detach(weights, loaded):
    """On the same minibatch: cross-entropy of the modules, cut at the trunk's output."""
    config = with_weights(weights[0], mtp=regime("detach"))
    model = None, loaded.params, loaded.rest
    batch = tiny.minibatch(config, model)
    detach = tiny.gradient(config, model, batch).gradient["mtp"]
    samples = own_samples.Samples(batch.tokens, batch.segment_ids, batch.response_mask)

    def loss(params):
        return own_samples.modules_loss(loaded.replace(params=params), samples, config)[0]

    gradient = jax.jit(jax.grad(loss))(loaded.params)
    tiny.close(gradient["mtp"], detach, 1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["layers"]))
    assert np.any(gradient["embedding"]["embedding"])  # which the warm-up leaves out


@pytest.mark.standard_promotion
def test_the_warm_up_teaches_the_modules_alone(weights, programs):
    random = PretrainedConfig(str(weights[0]), attach="random")
    config = with_weights(weights[0], pretrained=random, warm_start=OWN)
    loaded = load_policy(config)
    losses = []
    with jax.set_mesh(programs.mesh):
        warmed, before, after = own_samples.warm_up_modules(
            programs, loaded, config, TASK, lambda step, all: losses.append(all)
        )
    assert losses[-1][0] < losses[0][0] - 0.2
    assert after[0] > before[0] + 0.2
    params = warmed.params
    chex.assert_trees_all_equal({**params, "mtp": None}, {**loaded.params, "mtp": None})
    changed = jax.tree.map(lambda a, b: np.any(a != b), params["mtp"], loaded.params["mtp"])
    assert all(jax.tree.leaves(changed))


def test_samples_are_the_models_own(weights, loaded, programs):
    """Drawn as rollouts are, and of training prompts."""
    config = with_weights(weights[0], warm_start=OWN)
    with jax.set_mesh(programs.mesh):
        held_out, pool = own_samples.draw(programs, loaded, config, TASK)
        again, _ = own_samples.draw(programs, loaded, config, TASK)
    assert len(held_out.tokens) == 16 and len(pool.tokens) == 32
    chex.assert_trees_all_equal(held_out, again)
    assert not np.array_equal(held_out.tokens, pool.tokens[:16])
    columns = TASK.max_prompt_tokens
    prompts = {problem.prompt for problem in TASK.train}
    present = pool.segment_ids[:, :columns] > 0
    assert set(TASK.tokenizer.decode_batch(pool.tokens[:, :columns], present)) <= prompts
    assert not pool.response_mask[:, :columns].any() and pool.response_mask.any(axis=1).all()
    assert (pool.response_mask <= (pool.segment_ids > 0)).all()


@pytest.mark.standard_promotion
def test_a_starting_point_is_made_once(weights, programs, tmp_path, monkeypatch):
    config = with_weights(weights[0], warm_start=dataclasses.replace(OWN, steps=3))
    start = runs.starting_point(config, TASK, programs, tmp_path)
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    monkeypatch.setattr(starting_point, "warm_up_modules", None)  # cannot be called again
    chex.assert_trees_all_equal(runs.starting_point(config, TASK, programs, tmp_path), start)
    assert stored < 0.8 * sum(leaf.nbytes for leaf in jax.tree.leaves(start))  # modules alone
    longer = dataclasses.replace(config, max_response_tokens=3)
    with pytest.raises(TypeError):
        runs.starting_point(longer, TASK, programs, tmp_path)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_run_goes_on_from_published_weights(weights, programs, tmp_path):
    config = with_weights(weights[0], rollouts=1, warm_start=dataclasses.replace(OWN, steps=2))
    start = runs.starting_point(config, TASK, programs, tmp_path / "starts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = loop.run(config, TASK, programs, start, tmp_path / "run")
    assert result["rollouts"] == 1 and len(result["final"]["mtp_acceptance"]) == 1
