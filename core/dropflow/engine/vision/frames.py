"""Which images of a call of the vision encoder are frames of which video, from the caller or the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from dropflow.errors import UnsupportedCall, UnsupportedModel
from dropflow.lifecycle.videos import Frames, are_stated, stated_videos

if TYPE_CHECKING:
    from dropflow.backbone.backbone import Backbone
    from dropflow.policy.plan import Plan


def check_videos(backbone: Backbone, plan: Plan, modality: str) -> None:
    """Refuse images of which nobody says which are frames, where a stage works on videos."""
    names = [name for name, stage in plan.stages if stage.reads_videos]
    if names and modality in backbone.unstated_videos and not are_stated(modality):
        raise UnsupportedCall(
            f"stages.{names[0]}: works on videos, but {type(backbone.model).__name__} gets the frames of videos and "
            f"pictures alike as `{modality}`; run the model inside `with dropflow.videos([...]):`, one list of frames "
            "for each video, `[]` for none"
        )


def video_of(videos: Frames | None) -> dict[int, int]:
    """Number of a frame among the images -> number of its video."""
    return {frame: video for video, frames in enumerate(videos or ()) for frame in frames}


def frames_of(backbone: Backbone, modality: str, entries: Sequence[int], arguments: Mapping[str, Any]) -> Frames | None:
    """The videos among the images of a call, of which the entries of its features hold so many each.

    What the caller states counts first. `None` where nobody says. Raises `UnsupportedModel` where the adapter states
    lengths that do not add up to the images.
    """
    images = sum(entries)
    if are_stated(modality):
        return stated_videos(modality, images)
    if modality in backbone.unstated_videos:
        return None
    if modality == "image":
        return ()
    lengths = backbone.video_lengths(entries, arguments)
    if lengths is None:
        return None
    if sum(lengths) != images:
        raise UnsupportedModel(
            f"{type(backbone).__name__}.video_lengths: states videos of {list(lengths)} frames, but the features have "
            f"{images} images; correct the adapter"
        )
    return tuple(tuple(range(start, end)) for start, end in pairwise(accumulate(lengths, initial=0)) if end > start)
