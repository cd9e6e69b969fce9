"""What an attached policy puts over the vision side of a model: tower, projector, and mergers of a packed tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dropflow.engine.attach.call import Call
from dropflow.engine.model.arguments import named
from dropflow.engine.model.shadowing import Shadows
from dropflow.engine.model.stand_in import Run, stand_in
from dropflow.engine.vision.vision_run import in_tower

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.policy.plan import Plan


class TowerHooks:
    """Hands what crosses the vision side of a model to the vision run of this thread's call."""

    def __init__(self, backbone: Backbone, mine: Callable[[], Call | None]) -> None:
        """`mine` returns the call of this thread; `None` outside a call."""
        self._backbone, self._mine = backbone, mine

    def install(self, standing: Shadows, handles: list[Any], plans: Sequence[Plan]) -> None:
        """Lay what the stages of `plans` need in `standing`, and append the handles of hooks to `handles`."""
        encoder = self._backbone.vision
        if encoder is not None:
            stand_in(standing, encoder.owner, self._vision_run)
            projector: Any = encoder.projector
            if projector is not None and any("features" in plan.encode_at for plan in plans):
                handles.append(projector.register_forward_pre_hook(self._before_projector))
                # compiled code that inlined this module ignores a new hook, but is recompiled for another forward
                standing.lay(projector.__dict__, "forward", self._projecting(projector.forward))
        packed = self._backbone.packed_tower
        if packed is not None and any(in_tower(place) for plan in plans for place in plan.encode_at):
            stand_in(standing, packed.owner, self._vision_run, packed.blocks)
            standing.lay(packed.owner.__dict__, "forward", self._running_tower(packed.owner))
            for merger in packed.mergers:
                standing.lay(merger.__dict__, "forward", self._merging(merger.forward))
        if encoder is None and any(stage.vision_taps for plan in plans for _, stage in plan.stages):
            for reader in filter(None, map(self._backbone.reader, self._backbone.modalities)):
                stand_in(standing, reader.owner, self._vision_run, reader.layers)

    def _vision_run(self) -> Run | None:
        call = self._mine()
        return call.vision if call is not None and call.vision is not None and call.vision.inside else None

    def _before_projector(self, projector: Any, args: tuple[Any, ...]) -> Any:  # noqa: ARG002
        return self._projected(args[0]), *args[1:]

    def _projecting(self, forward: Any) -> Any:
        """The projector's forward, applied only to the rows that the stages keep of its input."""

        @wraps(forward)
        def project(rows: Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(self._projected(rows), *args, **kwargs)

        return project

    def _projected(self, rows: Tensor) -> Tensor:
        call = self._mine()
        if call is None or call.vision is None or not call.vision.reduces_features:
            return rows
        return call.vision.features(rows)

    def _running_tower(self, tower: Any) -> Any:
        """A packed tower's forward, on the units that the stages keep."""
        forward = tower.forward

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            call = self._mine()
            if call is None or call.vision is None:
                return forward(*args, **kwargs)
            return call.vision.tower(forward, named(tower, args, kwargs)[1])

        return run

    def _merging(self, forward: Any) -> Any:
        """The forward of a packed tower's merger, with rows for the units that the stages left out inside the tower."""

        @wraps(forward)
        def merge(*args: Any, **kwargs: Any) -> Any:
            call, merged = self._mine(), forward(*args, **kwargs)
            packed = None if call is None or call.vision is None else call.vision.packed
            return merged if packed is None else packed.merged(merged)

        return merge
