"""What methods share: pure functions of tensors, by kind, the dividing of a budget, and CLIP's joint space."""

from typing import TYPE_CHECKING

from dropflow.lifecycle.lazy import lazy_names
from dropflow.operators.budgets import divide, first_keep

if TYPE_CHECKING:
    from dropflow.operators.blending import Blend, blended
    from dropflow.operators.clustering import density_peaks
    from dropflow.operators.frames import frame_keeps, frame_scores, whole_frames
    from dropflow.operators.joint_space import JointSpace
    from dropflow.operators.merging import (
        first_places,
        mean_into,
        merge_windows,
        most_alike,
        window_members,
        window_similarity,
    )
    from dropflow.operators.ranking import (
        columns_of,
        instruction_scores,
        keep_best,
        keep_best_of_videos,
        row_parts,
        text_rows,
    )
    from dropflow.operators.relaxation import soft_counted, soft_top, standardised, straight_through
    from dropflow.operators.selection import keep_top, top
else:
    _HOMES = {
        "dropflow.operators.blending": ("Blend", "blended"),
        "dropflow.operators.clustering": ("density_peaks",),
        "dropflow.operators.frames": ("frame_keeps", "frame_scores", "whole_frames"),
        "dropflow.operators.joint_space": ("JointSpace",),
        "dropflow.operators.merging": (
            "first_places",
            "mean_into",
            "merge_windows",
            "most_alike",
            "window_members",
            "window_similarity",
        ),
        "dropflow.operators.ranking": (
            "columns_of",
            "instruction_scores",
            "keep_best",
            "keep_best_of_videos",
            "row_parts",
            "text_rows",
        ),
        "dropflow.operators.relaxation": ("soft_counted", "soft_top", "standardised", "straight_through"),
        "dropflow.operators.selection": ("keep_top", "top"),
    }
    __getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Blend",
    "JointSpace",
    "blended",
    "columns_of",
    "density_peaks",
    "divide",
    "first_keep",
    "first_places",
    "frame_keeps",
    "frame_scores",
    "instruction_scores",
    "keep_best",
    "keep_best_of_videos",
    "keep_top",
    "mean_into",
    "merge_windows",
    "most_alike",
    "row_parts",
    "soft_counted",
    "soft_top",
    "standardised",
    "straight_through",
    "text_rows",
    "top",
    "whole_frames",
    "window_members",
    "window_similarity",
]
