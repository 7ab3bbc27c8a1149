"""From a run's folder to a published one, and back."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import export
from occ.models import pretrained
from occ.models.policy import abstract_policy
from occ.training import loop
from occ.training.config import LayoutConfig, PretrainedConfig
from occ.training.durable.checkpoints import Checkpoints
from occ.training.durable.history import History
from occ.training.durable.run_folder import RunFolder
from occ.training.programs import abstract_state, fresh_state
from occ.training.sharding import make_mesh
from tests import tiny
from tests.published import write_folder

pytestmark = pytest.mark.standard_promotion


def begin(folder, config, policy):
    """A run of which there are two checkpoints, the first the best; nothing is trained."""
    RunFolder(folder, config).close()
    mesh = make_mesh(config.layout)
    state = fresh_state(config, policy)
    shapes = abstract_state(config, abstract_policy(config.model), mesh)
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, shapes)
    with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, state, History().evaluated(1, 0.5))
        later = state.replace(params=jax.tree.map(lambda x: 2 * x, state.params))
        checkpoints.save(2, later, History().evaluated(1, 0.5))


def test_a_checkpoint_becomes_a_folder_that_loads(tmp_path, monkeypatch, capsys):
    config = tiny.run_config("tiny")
    policy = loop.init_policy(config)
    params = policy.params
    begin(tmp_path / "run", config, policy)
    target = tmp_path / "exported" / "model"
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "run"), str(target)])
    assert export.main() == 0
    assert "after 2 rollouts" in capsys.readouterr().out
    model = pretrained.load(target)
    assert model.config.mtp == config.model.mtp
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), model.params, params)
    weights = target / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not the file that was written"):
        pretrained.load(target)
    best = export.Arguments(tmp_path / "run", tmp_path / "best", which="best")
    assert export.export(best) == 1
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path / "best").params, params)


@pytest.mark.parametrize("name", ["", "Owner/Name"])
def test_a_run_that_began_from_a_folder_keeps_its_form(tmp_path, monkeypatch, name):
    """On a mesh, in float32, and back in bfloat16 with the tokenizer; or from a hub's cache."""
    commit = "0" * 40
    repository = tmp_path / "models--Owner--Name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = write_folder(repository / "snapshots" / commit, "glm", "bfloat16")
    (source / "tokenizer.json").write_text("{}")
    overrides = {"param_dtype": "float32", "compute_dtype": "float32"}
    model = pretrained.load(source, pretrained.read_config(source, **overrides))
    base = tiny.run_config("tiny", model=model.config, layout=LayoutConfig(fsdp=2))
    config = dataclasses.replace(base, pretrained=PretrainedConfig(name or str(source)))
    begin(tmp_path / "run", config, model)
    export.export(export.Arguments(tmp_path / "run", tmp_path / "saved", which="best"))
    saved, before = pretrained.load(tmp_path / "saved"), pretrained.load(source)
    assert saved.config == before.config
    assert saved.config.param_dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, saved.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, saved.rest, before.rest)
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        export.export(export.Arguments(tmp_path, tmp_path / "out"))
