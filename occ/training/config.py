"""Configuration of a training run: frozen dataclasses, each field with its unit or reason."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from occ.checks import validate
from occ.generation.engines.config import EngineConfig as EngineConfig
from occ.models.config import ModelConfig
from occ.objectives.advantages import METHODS, TOKEN_METHODS, WITHOUT_GROUP
from occ.objectives.policy import PolicyConfig
from occ.training.layout import LayoutConfig as LayoutConfig
from occ.training.mtp_config import MTPTrainingConfig as MTPTrainingConfig
from occ.training.rollout_config import EvaluationConfig as EvaluationConfig
from occ.training.rollout_config import RolloutConfig as RolloutConfig
from occ.training.start_config import PretrainedConfig as PretrainedConfig
from occ.training.start_config import WarmStartConfig as WarmStartConfig

ADVANTAGES = METHODS + TOKEN_METHODS

if TYPE_CHECKING:
    AdvantageName = str
else:
    AdvantageName = Literal[ADVANTAGES]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The RL objective of the main head.

    Attributes:
      policy: the clipped token loss.
      advantage: estimator from the rewards of the samples; see `occ.objectives.advantages`.
        "remax" also generates the most likely response to each prompt, one more beside the samples.
      gamma: discount a token of advantage "reinforce++-tokens".
      aggregation: how token losses become one number; named, since it changes the gradient by an
        order of magnitude between projects.
      constant_length: tokens, the divisor of aggregation "constant-length" (Dr.GRPO).
      kl_coefficient: weight of the KL term to the reference policy; 0 is off.
      kl_in_reward: it is taken from the rewards, token by token under the policy that sampled, and
        not added to the loss. The gradient is that of the divergence with estimator "k1" alone.
      kl_estimator: per-token estimator of it.
      kl_clamp: nats, bound on |log pi - log reference| of a token before use, without which k3
        overflows (verl: 20); None is none (TRL).
      entropy_coefficient: weight of the entropy bonus; 0 is off.
      importance_cap: truncation of the importance weight old / rollout policy; None is off, but
        for `EngineConfig.importance_cap`, where another process samples, or one rollout ahead.
    """

    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    advantage: AdvantageName = dataclasses.field(default="grpo", metadata={"one_of": ADVANTAGES})
    gamma: float = 1.0
    aggregation: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant-length"
    ] = "token-mean"
    constant_length: int | None = None
    kl_coefficient: float = 0.0
    kl_in_reward: bool = False
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    kl_clamp: float | None = 20.0
    entropy_coefficient: float = 0.0
    importance_cap: float | None = None

    def __post_init__(self):
        validate(self)
        if (self.aggregation == "constant-length") != (self.constant_length is not None):
            raise ValueError(
                "ObjectiveConfig: constant_length goes with aggregation='constant-length' and with "
                f"no other, got {self.constant_length} with {self.aggregation!r}."
            )
        if self.gamma != 1 and self.advantage != "reinforce++-tokens":
            raise ValueError(
                "ObjectiveConfig: gamma discounts the rewards of later tokens, which only "
                f"advantage='reinforce++-tokens' looks at one by one, got {self.gamma} with "
                f"{self.advantage!r}."
            )
        if self.kl_in_reward and not self.kl_coefficient:
            raise ValueError(
                "ObjectiveConfig: kl_in_reward moves the KL term, and kl_coefficient=0 has none."
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW after clipping.

    Attributes:
      learning_rate: peak, constant after the warm-up.
      warmup_steps: gradient steps of linear warm-up.
      weight_decay: decoupled; per step it removes learning_rate * weight_decay of a weight.
      decay: which parameters decay: "matrices" (kernels and embeddings) or "all" (the paper's).
      b1, b2, adam_epsilon: Adam's.
      clip_norm: global gradient norm above which gradients are scaled down.
      clip_groups: "separate" clips shared parameters and the MTP modules' own as two groups, so
        that an MTP loss with a large gradient does not shrink the policy's step; "together" uses
        one norm, as the paper's release does.
      router_bias_rate: how far a step moves each correction bias of the trunk's routers against
        its expert's load (no gradient reaches it); 0 leaves them as they are.
    """

    learning_rate: float = 2e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    decay: Literal["matrices", "all"] = "matrices"
    b1: float = 0.9
    b2: float = 0.999
    adam_epsilon: float = 1e-8
    clip_norm: float = 1.0
    clip_groups: Literal["separate", "together"] = "separate"
    router_bias_rate: float = 0.0

    def __post_init__(self):
        validate(self)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run.

    Attributes:
      name: for the run folder.
      model: architecture, with `model.mtp` for the modules.
      task: name of a task in `occ.tasks`.
      task_options: keyword options of that task.
      pretrained: weights to begin with; None begins with random ones.
      objective, mtp, optimizer, rollout, engine, warm_start, evaluation, layout: see their classes.
      rollouts: how many rollouts are trained on.
      max_prompt_tokens, max_response_tokens: tokens; None takes the task's.
      checkpoint_every: rollouts between checkpoints.
      keep_checkpoints: how many of the newest are kept, beside the best by sampled accuracy; with
        2, a damaged one has one before it.
      max_bad_updates: so many updates in a row that are skipped, for a loss or gradient that is
        not finite, end the run.
      seed: of initialisation, data order and sampling.
    """

    name: str
    model: ModelConfig
    task: str
    task_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: PretrainedConfig | None = None
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    mtp: MTPTrainingConfig = dataclasses.field(default_factory=MTPTrainingConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    warm_start: WarmStartConfig = dataclasses.field(default_factory=WarmStartConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    layout: LayoutConfig = dataclasses.field(default_factory=LayoutConfig)
    rollouts: int = 100
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    checkpoint_every: int = 25
    keep_checkpoints: int = 2
    max_bad_updates: int = 10
    seed: int = 0

    def __post_init__(self):
        validate(self)
        alone_will_do = self.objective.advantage in WITHOUT_GROUP
        if self.rollout.samples < 2 and (self.rollout.dynamic_sampling or not alone_will_do):
            raise ValueError(
                "TrainConfig: rollout.samples must be at least 2, got 1: advantages and dynamic "
                "sampling compare the samples of one prompt with each other, and a group of one "
                f"has nothing to compare. Advantages that do without: {', '.join(WITHOUT_GROUP)}."
            )
        if self.model.param_dtype == "float16":
            raise ValueError(
                "TrainConfig: parameters of param_dtype='float16' cannot be trained: Adam's "
                "epsilon and squares of gradients are 0 there. Use 'float32' or 'bfloat16'."
            )
        if self.mtp.loss != "none" and self.model.mtp.num_modules < 1:
            raise ValueError(
                f"TrainConfig: MTP loss {self.mtp.loss!r} with K = 0 modules. Give the model "
                "modules (model.mtp.num_modules >= 1), or train with regime('rl_only')."
            )
        if self.warm_start.learns_modules and self.model.mtp.num_modules < 1:
            raise ValueError(
                "TrainConfig: warm_start.kind='own_samples' trains MTP modules, and there are "
                "none. Set model.mtp.num_modules >= 1, or warm_start.steps=0."
            )
        if self.warm_start.learns_modules and self.warm_start.batch_size % self.layout.row_parts:
            raise ValueError(
                f"TrainConfig: warm_start.batch_size ({self.warm_start.batch_size}) cannot be cut "
                f"evenly on {self.layout.row_parts} devices (data x fsdp x expert)."
            )
        rows = self.rollout.prompts * self.rollout.samples // self.rollout.minibatches
        if rows % (self.layout.row_parts * self.layout.micro_batches):
            raise ValueError(
                f"TrainConfig: a minibatch of {rows} sequences cannot be cut evenly into "
                f"{self.layout.micro_batches} micro-batches on {self.layout.row_parts} devices "
                "(data x fsdp x expert). Change RolloutConfig or LayoutConfig."
            )
        self._check_halves(rows)
        self._check_measure()
        if self.rollout.routing_replay and self.model.moe is None:
            raise ValueError(
                "TrainConfig: rollout.routing_replay repeats the choice of a mixture of experts, "
                "and the model is dense (model.moe=None). Leave it off."
            )
        if self.engine.external and self.layout.draft_depth:
            raise ValueError(
                "TrainConfig: layout.draft_depth is of the in-process engine, got "
                f"{self.layout.draft_depth!r} with engine {self.engine.kind!r}. Use "
                "engine.draft_depth."
            )

    @property
    def importance_cap(self) -> float | None:
        """Of the truncated importance weights: the objective's, or else the engine's."""
        off_policy = self.engine.external or self.engine.overlap
        if self.objective.importance_cap is not None or not off_policy:
            return self.objective.importance_cap
        return self.engine.importance_cap

    @property
    def _measured(self) -> bool:
        return self.mtp.loss != "none" and self.mtp.data_dependent

    def _check_measure(self) -> None:
        without_adapters = ("readout", "embedding")
        if self.model.lora and self._measured and self.mtp.measure in without_adapters:
            raise ValueError(
                f"TrainConfig: measure {self.mtp.measure!r} reads gradients of embedding, final "
                "norm or output head, which model.lora freezes. Use a measure that is not in "
                f"{without_adapters}, or train all parameters (model.lora=None)."
            )
        if self.layout.pack and self.mtp.data_dependent and self.mtp.measure == "released_unmasked":
            raise ValueError(
                "TrainConfig: measure 'released_unmasked' is a mean over all positions, padding "
                "included, and layout.pack=True leaves most of the padding out: the coefficient "
                "would be another. Use layout.pack=False, or another measure ('released_masked' is "
                "the same mean over response tokens)."
            )

    def _check_halves(self, rows: int) -> None:
        """Halves of a minibatch that are compared must not share a prompt."""
        if not self._measured or "gradient_halves" not in self.mtp.make_measure().evidence:
            return
        border = self.mtp.leading_rows(rows)
        if border % self.rollout.samples or not 0 < border < rows:
            raise ValueError(
                f"TrainConfig: measure {self.mtp.measure!r} compares the first {border} of a "
                f"minibatch's {rows} sequences with the others, and the border would stand among "
                f"the {self.rollout.samples} samples of one prompt, which share their noise. "
                "Choose RolloutConfig.prompts as a multiple of 2 x minibatches."
            )
