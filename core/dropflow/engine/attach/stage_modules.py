"""The modules that stages train: built when a policy is attached, and registered on the model while it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dropflow.engine.decoder.trained import Trained
from dropflow.engine.model.shadowing import Shadows
from dropflow.errors import PolicyError, UnsupportedCall, UnsupportedModel

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.lifecycle.stage import Stage
    from dropflow.policy.plan import Plan

NAME = "dropflow_stages"
"""Name of the submodule of the model that holds the stages' modules."""
_SEED = 0


class StageModules:
    """The modules of the stages of all policies that are attached to one model.

    Stages of the same name in several policies share a module. `holder` has one submodule for each stage, under the
    stage's name with `/` for `.`; it is registered on the model by `lay`.
    """

    def __init__(self, backbone: Backbone, plans: Iterable[Plan | None]) -> None:
        """Build the modules. Raises `PolicyError` if policies build different ones under the same name."""
        self.holder = nn.Module()
        self.stages: dict[str, Stage[Any]] = {}
        """One stage of each name that has a module."""
        for name, stage in ((name, stage) for plan in plans if plan is not None for name, stage in plan.stages):
            module = _built(name, stage, backbone)
            if module is None:
                continue
            if name not in self.stages:
                self.stages[name] = stage
                self.holder._modules[key_of(name)] = module
            elif type(stage) is not type(self.stages[name]) or not _alike(self.of(name), module):
                raise PolicyError(
                    f"stages.{name}: two policies of the set build different modules under this name, which share what "
                    "is trained; rename the stage in one of them"
                )
        self.holder.train(backbone.model.training)

    def of(self, name: str) -> nn.Module:
        """The module of the stage `name`."""
        module = self.holder._modules[key_of(name)]
        assert module is not None
        return module

    def trained_by(self, plan: Plan) -> Trained:
        """What the stages of one policy train."""
        return Trained({name: self.of(name) for name, _ in plan.stages if name in self.stages})

    def check_not_wrapped(self, model: Any, given: Any) -> None:
        """Refuse a model that was sharded or wrapped before, because its ranks would each train modules of their own.

        `given` is what the caller passed, `model` the model inside.
        """
        if not self.stages:
            return
        name = next(iter(self.stages))
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise UnsupportedModel(
                f"stages.{name}: has a module to train, which FSDP2 would not shard; attach the policy before "
                "`fully_shard`"
            )
        if isinstance(given, DistributedDataParallel):
            raise UnsupportedModel(
                f"stages.{name}: has a module to train, whose gradients DistributedDataParallel would not average; "
                "attach the policy before wrapping the model"
            )

    def check_reduced(self) -> None:
        """Refuse a forward inside a `DistributedDataParallel` that was made before the policy was attached."""
        wrapper: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is None or not self.stages:
            return
        known = {id(parameter) for parameter in wrapper._module_parameters}
        if any(parameter.requires_grad and id(parameter) not in known for parameter in self.holder.parameters()):
            raise UnsupportedCall(
                f"stages.{next(iter(self.stages))}: has a module to train, but the model was wrapped in "
                "DistributedDataParallel before the policy was attached; attach first and wrap then"
            )

    def lay(self, shadows: Shadows, model: nn.Module) -> None:
        """Register the modules on the model until the shadows are lifted; nothing if there are none."""
        if self.stages:
            shadows.lay(model._modules, NAME, self.holder)

    def hidden(self, shadows: Shadows, model: nn.Module) -> AbstractContextManager[None]:
        """Take the modules out of the model inside a block, so that its own weights are saved without them."""
        return shadows.over(model._modules, NAME, None)

    def states(self, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The modules' own entries of the model's `state_dict`, by their names in `holder`; by default present ones."""
        if state_dict is None:
            return self.holder.state_dict()
        return {name[len(NAME) + 1 :]: value for name, value in state_dict.items() if is_of_stages(name)}


def key_of(stage: str) -> str:
    """Name of a stage's submodule: names of submodules have no dots."""
    return stage.replace(".", "/")


def is_of_stages(name: str) -> bool:
    """Whether an entry of a model's `state_dict` belongs to the modules of stages."""
    return name.startswith(f"{NAME}.")


def _built(name: str, stage: Stage[Any], backbone: Backbone) -> nn.Module | None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        module = stage.build_module(backbone)
    if module is None:
        return None
    if not isinstance(module, nn.Module):
        raise PolicyError(
            f"stages.{name}: `build_module` returned a {type(module).__name__}; return a torch.nn.Module, or None"
        )
    weight = backbone.text.get_input_embeddings().weight
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device  # offloaded
    narrow = weight.dtype.is_floating_point and not stage.float32
    return module.to(device=device, dtype=weight.dtype if narrow else None)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules were built the same."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        value.shape == second[name].shape and torch.equal(value, second[name]) for name, value in first.items()
    )
