"""Tree merging: attended, diverse tokens of every frame stay, the others are merged over time and space (FlashVID)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dropflow import Encode, EncodeCall, Forecast, Stage, StageOptions, hookimpl, operators


class TreeMergingOptions(StageOptions):
    """Options of `flashvid/tree-merging`."""

    retention: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="share of a frame's tokens, averaged over the layers of the LLM, if `flashvid/late-rank` follows "
        "as published: 1.25 times as many enter it",
    )
    alpha: float = Field(
        default=0.7, gt=0, le=1, description="share of them that are selected; the others sum up the rest"
    )
    events: bool = Field(
        default=True,
        description="whether selection also prefers tokens that fit their segment as a whole, as released for LLaVA; "
        "false for Qwen",
    )
    segment_threshold: float = Field(
        default=0.9, description="cosine of the means of two frames below which a segment ends"
    )
    fewest_segments: int = Field(
        default=8,
        ge=1,
        description="segments a video has at least, as far as it has frames: up to so many frames, none is merged with "
        "another; published are 8 for LLaVA and 4 for Qwen",
    )
    merge_threshold: float = Field(
        default=0.8, description="cosine above which a token is merged into one of the frame before"
    )
    layer: int = Field(
        default=-1,
        description="vision encoder layer whose received attention selects; negative ones count from its end. In a "
        "tower with windowed layers, name one without",
    )
    published_means: bool = Field(
        default=False,
        description="whether merged rows are computed as in the released code, where they are no means (a token of six "
        "equal frames comes out three times as large) and lone frames merge selected tokens once more",
    )


class TreeMerging(Stage[TreeMergingOptions]):
    """Of every frame, attended tokens stay that are unlike each other; the rest are merged over time, then in clusters.

    A video is cut into segments of alike frames. In a segment, a token that is not selected joins the most alike one of
    the frame before, wherever that lies, so that trees grow over time; what they leave of each frame is clustered by
    density peaks, and every cluster is one row, at the place of its centre. Selected tokens stay unchanged. Pictures
    stay whole; newlines and time stamps count for nothing and follow the engine's rule.

    Other than released: a merged row is the mean of all tokens it stands for (see `published_means`), no token is
    selected twice, equal densities count in raster order instead of at random, every video of a batch is reduced by
    itself, and Qwen3-VL's tokens around frames stay. Where tokens are pooled from several patches, the attention they
    receive is pooled alike.
    """

    Options = TreeMergingOptions
    summary = "attended, diverse tokens of a video's frames stay, the others are merged over time and in clusters"
    paper = "arXiv:2602.08024"
    example: ClassVar[Mapping[str, Any]] = {
        "retention": 0.6,
        "alpha": 0.5,
        "fewest_segments": 1,
        "segment_threshold": -1.0,
    }
    needs = frozenset({"vision_attention"})

    @property
    def reads_videos(self) -> bool:
        """True: tokens are merged across frames."""
        return True

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """The selecting layer."""
        return (self.options.layer,)

    def forecast(self) -> Forecast:
        """The data decide how many rows each frame has."""
        return Forecast(encoded="data")

    @hookimpl
    def encode(self, call: EncodeCall) -> Encode | None:
        """Reduce every video."""
        import torch

        from dropflow_flashvid.reduction import Reduction

        if not call.videos:
            return None
        reduce = Reduction(**self.options.model_dump(exclude={"layer"}))
        with torch.no_grad():
            received = call.received_attention(self.options.layer)
            blends = [
                reduce(operators.whole_frames(call, video), torch.stack([received[frame] for frame in video]))
                for video in call.videos
            ]
        return operators.blended(call, blends)
