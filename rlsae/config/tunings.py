"""Rewards, and the recipes that turn a base model into a tuned one."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlsae.config.entry import CorpusName, Entry, OptionalPath, Positive, RewardName, Seed

Scope = Literal["response", "full"]
Range = tuple[Positive, Positive]
NotNegative = Annotated[float, Field(ge=0)]


# --- rewards -----------------------------------------------------------------------------------------------------


class LexiconReward(Entry):
    """Sum of the polarity of a text's words, scaled and clipped (arXiv 2310.08164 section 3.1)."""

    kind: Literal["lexicon"]
    path: OptionalPath = Field(None, description="Tab-separated word and polarity per line; null: VADER's lexicon.")
    scale: float = Field(0.2, description="The sum of polarities is multiplied by this.")
    clip: Annotated[float, Field(gt=0)] = Field(10.0, description="Rewards are clipped to ± this.")
    scope: Scope = Field("response", description="Score the response, or prompt and response.")


class PythonReward(Entry):
    """A function of your own: `(prompts: list[str], responses: list[str]) -> list[float]`."""

    kind: Literal["python"]
    path: OptionalPath = Field(None, description="The Python file that defines the function.")
    function: str = Field(
        "reward",
        description="Name of the function in that file; without a file `package.module:function` of an installed package, "
        "whose changes nobody notices.",
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.path is None) != (":" in self.function):
            raise ValueError("give a path and the name of a function in it, or function: package.module:function alone")
        return self


class FolderOrRepository(Entry):
    """A transformers model that is not a base model of the study."""

    path: OptionalPath = Field(None, description="Its folder; or give a repository.")
    repository: str | None = Field(None, description="Its repository on the hub.")
    revision: str = Field("main", description="Commit or tag of the repository; pin it for a reproducible study.")

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.path is None) == (self.repository is None):
            raise ValueError("give either a path or a repository")
        return self


class ClassifierReward(FolderOrRepository):
    """A sequence-classification model: the logit or the probability of one of its labels."""

    kind: Literal["classifier"]
    label: str = Field(description="Label that is rewarded, as in the model's id2label; or its number.")
    output: Literal["logit", "probability"] = Field("logit", description="What of the label is the reward.")
    scale: float = Field(1.0, description="The output is multiplied by this.")
    scope: Scope = Field("full", description="Score the response, or prompt and response.")
    batch_size: Positive = Field(64, description="Texts scored at once.")


AnyReward = Annotated[LexiconReward | PythonReward | ClassifierReward, Field(discriminator="kind")]


# --- tunings -----------------------------------------------------------------------------------------------------


class Tuning(Entry):
    """What every tuning has: the reward and the prompts by which it is judged."""

    reward: RewardName = Field(description="Entry of `rewards`; what dpo and external do not train on, they are judged by.")
    corpus: CorpusName = Field(
        description="Corpus of the prompts: beginnings of its documents, or the prompts of its preference pairs. "
        "Held-out ones serve the evaluation."
    )
    seed: Seed = Field(0, description="Prompts, sampling, order of the data and new weights.")
    query_tokens: Range = Field((2, 10), description="Shortest and longest prompt cut from a document, in tokens.")
    response_tokens: Range = Field((8, 20), description="Shortest and longest limit of a response, in tokens.")
    evaluation_prompts: Positive = Field(512, description="Held-out prompts of the evaluation.")

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for key in ("query_tokens", "response_tokens"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key}: shortest {low} exceeds longest {high}")
        return self

    def checkpoint_steps(self) -> list[int]:
        """Batches after which a checkpoint is published."""
        return []


class Lora(Entry):
    """Low-rank adapters on every linear layer of the blocks (arXiv 2106.09685), merged when the policy is published."""

    rank: Positive = Field(8, description="Rank of each update.")
    alpha: Positive = Field(16, description="Updates are scaled by alpha / rank.")


class Training(Tuning):
    """What every tuning that trains here has."""

    batches: Positive = Field(24, description="Batches: rollouts of ppo, rloo and grpo, optimizer steps of dpo.")
    batch_size: Positive = Field(128, description="Responses per rollout batch, or pairs per step of dpo.")
    learning_rate: NotNegative = Field(5e-4, description="Peak learning rate of the policy.")
    warmup_batches: Annotated[int, Field(ge=0)] = Field(2, description="Batches of linear warm-up, then linearly to zero.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradient clipping.")
    gradient_accumulation: Positive = Field(
        1, description="Parts that each optimizer step is computed in, to save memory: of ppo the same step."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Number format of the forward and backward pass; weights and optimizer stay float32."
    )
    lora: Lora | None = Field(None, description="Train low-rank adapters instead of all weights.")
    checkpoints: Annotated[int, Field(ge=0)] = Field(0, description="Evenly spaced moments published on the way.")

    @model_validator(mode="after")
    def _checkpoints_fit(self) -> Self:
        if self.checkpoints >= self.batches:
            raise ValueError(f"checkpoints: {self.checkpoints} moments need more than {self.batches} batches")
        return self

    @property
    def rows_per_step(self) -> int:
        """Responses or pairs of one optimizer step."""
        return self.batch_size

    @property
    def rows_at_once(self) -> int:
        """Responses or pairs in memory at once."""
        return self.rows_per_step // self.gradient_accumulation

    @model_validator(mode="after")
    def _parts_are_whole(self) -> Self:
        if self.rows_per_step % self.gradient_accumulation:
            raise ValueError(f"gradient_accumulation {self.gradient_accumulation} does not divide {self.rows_per_step} rows")
        return self

    def checkpoint_steps(self) -> list[int]:
        return [round(self.batches * k / (self.checkpoints + 1)) for k in range(1, self.checkpoints + 1)]


class OnPolicyTuning(Training):
    """What the methods have that sample responses, score them, and learn from them."""

    minibatch_size: Positive = Field(32, description="Responses per optimizer step.")
    epochs: Positive = Field(2, description="Passes over each rollout batch.")
    kl_coefficient: NotNegative = Field(0.2, description="Weight of the KL penalty; of ppo, the initial one.")
    clip: Annotated[float, Field(gt=0)] = Field(0.2, description="Clip range of the policy ratio.")

    @property
    def rows_per_step(self) -> int:
        return self.minibatch_size

    @model_validator(mode="after")
    def _minibatches_are_whole(self) -> Self:
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of minibatch_size {self.minibatch_size}")
        return self


class PPOTuning(OnPolicyTuning):
    """Proximal policy optimisation (arXiv 1707.06347) with a KL penalty to the base (arXiv 1909.08593)."""

    method: Literal["ppo"]
    value_learning_rate: NotNegative = Field(1e-3, description="Peak learning rate of the value head.")
    kl_target: Annotated[float, Field(gt=0)] | None = Field(
        6.0, description="Nats per response that the adaptive coefficient aims at; null: fixed coefficient."
    )
    kl_horizon: Positive = Field(1000, description="Responses over which the coefficient adapts.")
    value_clip: Annotated[float, Field(gt=0)] = Field(0.2, description="Clip range of the value change.")
    value_coefficient: NotNegative = Field(0.1, description="Weight of the value loss.")
    discount: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Discount γ per token.")
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = Field(0.95, description="λ of the advantage estimate.")
    whiten_rewards: bool = Field(False, description="Scale the rewards of a batch to unit variance, their mean kept.")


class GroupTuning(OnPolicyTuning):
    group_size: Annotated[int, Field(ge=2)] = Field(4, description="Responses to each prompt, each other's baseline.")
    learning_rate: NotNegative = Field(3e-4, description="Peak learning rate of the policy.")
    kl_coefficient: NotNegative = Field(0.05, description="Weight of the KL penalty.")

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        if self.batch_size % self.group_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of group_size {self.group_size}")
        return self


class RLOOTuning(GroupTuning):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740), by TRL; the KL penalty is part of the reward."""

    method: Literal["rloo"]


class GRPOTuning(GroupTuning):
    """Group-relative policy optimisation (arXiv 2402.03300), by TRL; the KL penalty is part of the loss."""

    method: Literal["grpo"]


class DPOTuning(Training):
    """Direct preference optimisation (arXiv 2305.18290), by TRL, on the preference pairs of its corpus."""

    method: Literal["dpo"]
    batches: Positive = Field(80, description="Optimizer steps.")
    batch_size: Positive = Field(32, description="Pairs per optimizer step.")
    learning_rate: NotNegative = Field(1e-4, description="Peak learning rate of the policy.")
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="Inverse temperature of the implicit reward.")
    max_tokens: Positive | None = Field(
        None, description="Prompt and response are cut after so many tokens; null: the model's context."
    )


class ExternalTuning(Tuning, FolderOrRepository):
    """A tuned model from elsewhere: evaluated and published, not trained."""

    method: Literal["external"]


AnyTuning = Annotated[
    PPOTuning | RLOOTuning | GRPOTuning | DPOTuning | ExternalTuning,
    Field(discriminator="method"),
]
