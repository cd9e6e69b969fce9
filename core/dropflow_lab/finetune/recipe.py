"""A training recipe: stages of training, each with data, trainable parts and an optimizer; checked without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dropflow.policy.bounds import Name

SETTINGS = "settings.json"
"""File beside the folders of the stages that holds what a resumed run must share."""
PARTS = ("vision", "projector", "language", "stages")
"""Parts of a model that a stage can train; every parameter belongs to one of them. `stages` is what the stages of the
policy train, such as a scorer or a schedule."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerOptions(_Part):
    """The optimizer of a stage, and the course of its learning rate."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for hidden matrices and AdamW for everything else, with settings of their own"
    )
    rate: float = Field(ge=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of AdamW")
    schedule: Literal["cosine", "hold", "constant"] = Field(
        "cosine", description="after the warm-up: cosine to zero; the peak for half of the steps, then linear; the peak"
    )
    warmup: float = Field(0.03, ge=0, description="steps of linear warm-up; below 1, their share of all steps")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient of a step; 0 for no limit")

    @model_validator(mode="after")
    def _own_settings(self) -> Self:
        if self.name == "muon" and self.model_fields_set & {"weight_decay", "betas"}:
            raise ValueError("muon has a weight decay and betas of its own; leave these out, or use adamw")
        return self


class TrainingStage(_Part):
    """One stage of training; it starts from the weights of the one before."""

    data: str = Field(min_length=1, description="`digits`, or a folder with images/ and a .jsonl file")
    train: tuple[str, ...] = Field(
        ("projector", "language"),
        min_length=1,
        description="what is trained: vision, projector, language, stages (what the policy's stages learn), or "
        "patterns of parameter names such as `*.layers.3.*`; everything else is frozen",
    )
    steps: int | None = Field(None, ge=1, description="optimizer steps; instead of `epochs`")
    epochs: int | None = Field(None, ge=1, description="times that every sample is seen; instead of `steps`")
    batch: int = Field(16, ge=1, description="samples per step, over all processes")
    micro_batch: int | None = Field(
        None, ge=1, description="samples per forward and process; gradients of several forwards are added up to a step"
    )
    rounds: int = Field(1, ge=1, description="questions about the same pictures packed after them into one sample")
    gradient_checkpointing: bool = Field(
        False, description="compute layers again in the backward: less memory, more time"
    )
    optimizer: OptimizerOptions

    @field_validator("train")
    @classmethod
    def _known(cls, train: tuple[str, ...]) -> tuple[str, ...]:
        from dropflow.errors import nearest, quoted

        for name in train:
            if name not in PARTS and "*" not in name:
                raise ValueError(f"no part {quoted(name)}; {nearest(name, PARTS)} (a pattern of names contains a *)")
        return train

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("expected either `steps` or `epochs`")
        if self.steps is None and self.data == "digits":
            raise ValueError("expected `steps`: the digits questions are drawn without end")
        return self


class DenseSteps(_Part):
    """A share of steps on all visual tokens, for a model that runs without a policy afterwards."""

    share: float = Field(gt=0, lt=1, description="share of the steps, spread evenly")
    distill: float = Field(
        1.0, ge=0, description="weight, in these steps, of the divergence from the answers under the policy"
    )


class Recipe(_Part):
    """A whole run: what every stage shares, and the stages in order."""

    name: Name = Field(description="name of the recipe; the file's name if left out")
    model: str | None = Field(
        None, description="local folder, or the name of a model in the local cache; by default the embedded model"
    )
    policy: str | dict[str, Any] | None = Field(None, description="policy to train through: a name, a path or a policy")
    seed: int = Field(0, ge=0, description="random seed of the order of the samples, and of dropout")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16 computes under autocast; weights and optimizer states are float32 either way"
    )
    attention: Literal["sdpa", "matmul"] = Field(
        "sdpa", description="matmul: two plain matrix products, whose backward is faster on a CPU"
    )
    parallel: Literal["ddp", "fsdp2", "zero2"] = Field(
        "ddp", description="how several processes share the work: DistributedDataParallel, fully_shard, DeepSpeed"
    )
    logits: Literal["labelled", "all"] = Field(
        "labelled", description="`labelled` computes the logits that predict a label alone; see `dropflow.attach`"
    )
    dense: DenseSteps | None = Field(None, description="steps without the policy, which is then not recorded")
    save_every: int = Field(50, ge=1, description="steps between resumable checkpoints")
    log_every: int = Field(10, ge=1, description="steps between lines of the log")
    stages: dict[Name, TrainingStage] = Field(min_length=1, description="the stages by name, in order")

    @field_validator("stages")
    @classmethod
    def _apart(cls, stages: dict[str, TrainingStage]) -> dict[str, TrainingStage]:
        if SETTINGS in stages:
            raise ValueError(f"the file {SETTINGS} lies beside the stages' folders; give the stage another name")
        return stages

    @model_validator(mode="after")
    def _learned_by_stages(self) -> Self:
        for name, stage in self.stages.items():
            if self.dense is not None and set(stage.train) == {"stages"}:
                raise ValueError(
                    f"stages.{name}.train: the steps of `dense` run without the policy, so what its stages learn has "
                    "no gradient there; leave out `dense`, or train another part, too"
                )
            if self.parallel == "fsdp2" and "stages" in stage.train:
                raise ValueError(
                    f"stages.{name}.train: fsdp2 does not divide what the policy's stages learn; use ddp, or leave "
                    "`stages` out"
                )
        return self

    @model_validator(mode="after")
    def _sharded(self) -> Self:
        if self.parallel == "ddp":
            return self
        for name, stage in self.stages.items():
            if stage.optimizer.name == "muon":
                raise ValueError(
                    f"stages.{name}.optimizer.name: muon needs whole matrices, which {self.parallel} divides among the "
                    "processes; use adamw, or ddp"
                )
        return self
