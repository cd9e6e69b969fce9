"""The arguments of the model, as `--model_args` and lmms-eval's own options give them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dropflow.errors import nearest
from dropflow_lab.errors import InputError

DENSE = ("none", "dense")
"""Names that stand for no policy."""


class Arguments(BaseModel):
    """What may be written in `--model_args`, separated by commas."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    pretrained: str = Field(min_length=1)
    """Folder or hub name of the model, or the name of an embedded one, such as `hidrop`."""
    policy: str | None = None
    """Name or file of a policy, `none` for no policy; by default the one that the checkpoint records."""
    overrides: tuple[str, ...] = ()
    """Changes of the policy, `path=value` each, separated by semicolons."""
    batch_size: int = Field(default=1, ge=1)
    """Documents that are answered together."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Precision of the weights; by default that of the checkpoint, and float32 for the embedded models."""
    device: str | None = None
    """Device of a single process, such as `cuda:1`; by default the GPU of the process (`LOCAL_RANK`), or the CPU."""
    device_map: str | None = None
    """As in transformers' `from_pretrained`, such as `auto` for a model that needs several GPUs."""
    attn_implementation: str | None = None
    """As in transformers' `from_pretrained`."""
    revision: str | None = None
    """Branch, tag or commit of a model of the hub."""
    weights: str | None = None
    """Folder or file with trained weights of the policy's stages, if they do not lie beside the model."""
    adapter: str | None = None
    """Name of Dropflow's adapter for the model, if it is not the one of its type."""
    num_frames: int | None = Field(default=None, ge=1)
    """Frames that the processor takes of every video; by default as many as the model's processor says."""
    fps: float | None = Field(default=None, gt=0)
    """Frames per second that the processor takes of every video, instead of `num_frames`."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _separated(cls, given: Any) -> Any:
        return tuple(part.strip() for part in given.split(";") if part.strip()) if isinstance(given, str) else given

    @property
    def dense(self) -> bool:
        """Whether the model runs without a policy."""
        return self.policy in DENSE

    @property
    def loading(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` gets."""
        given = {
            "dtype": self.dtype,
            "device_map": self.device_map,
            "attn_implementation": self.attn_implementation,
            "revision": self.revision,
        }
        return {name: value for name, value in given.items() if value is not None}

    @property
    def sampling(self) -> dict[str, Any]:
        """What the processor gets for prompts with videos."""
        given = {"num_frames": self.num_frames, "fps": self.fps}
        return {name: value for name, value in given.items() if value is not None}


def read_arguments(given: dict[str, Any]) -> Arguments:
    """Return the arguments; raises `InputError` naming every one that is wrong."""
    given = {name: value for name, value in given.items() if name != "max_batch_size" and value is not None}
    try:
        found = Arguments.model_validate(given)
    except ValidationError as error:
        raise InputError("\n".join(_fault(one) for one in error.errors())) from None
    if found.overrides and found.dense:
        raise InputError(f"model_args: overrides: there is no policy to override with policy={found.policy}; name one")
    if found.device and found.device_map:
        raise InputError("model_args: device and device_map exclude each other; give one of them")
    if found.num_frames and found.fps:
        raise InputError("model_args: num_frames and fps exclude each other; give one of them")
    return found


def _fault(fault: Any) -> str:
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"model_args: {name}: no such argument; {nearest(name, Arguments.model_fields)}"
    if fault["type"] == "missing":
        return f"model_args: {name}: missing; name a folder, a model of the hub, or an embedded model"
    return f"model_args: {name}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"
