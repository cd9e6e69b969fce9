"""A replay forces the keeps of a trace: same tokens, same logits, whatever the scores say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_tracing import ENCODE, EVICTS, POLICIES, STEPS, Words, tiny_trace
from PIL import ImageOps
from tiny import HIDROP, policy, prompt, tiny_llava

import dropflow
from dropflow import Encode, EncodeCall, Stage, hookimpl, load_policy
from dropflow.errors import DecisionError, PolicyError
from dropflow_lab.digits.checkpoints.model import load, sample_image
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.prompts import build_inputs
from dropflow_lab.trace import Trace, drop_patches, keep_patches, record, record_inputs, replay_policy
from dropflow_lab.trace.edit import read_patches
from dropflow_lab.trace.follow import follow, follow_on
from dropflow_lab.trace.schema import TracedRun


@torch.no_grad()
def generated(model: Any, inputs: Any, which: Any) -> tuple[list[int], torch.Tensor]:
    """Tokens and logits of every step under a policy."""
    with dropflow.attach(model, which):
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences[0].tolist(), torch.stack(out.logits)


def assert_same(model: Any, inputs: Any, which: Any, trace: Trace) -> None:
    tokens, logits = generated(model, inputs, which)
    again, forced = generated(model, inputs, replay_policy(trace))
    assert again == tokens
    encoded = [image for run in trace.runs for step in run.encode for image in step.images]
    weighted = any(merge.shares for image in encoded for merge in image.merged or ())
    weighted |= any(size > 1 for image in encoded for size in image.sizes or ())
    error = 1e-5 if weighted else 1e-6  # the sums run in another order
    torch.testing.assert_close(forced, logits, rtol=error, atol=error)


@pytest.mark.parametrize("which", POLICIES.values(), ids=POLICIES)
def test_replay_gives_the_same_tokens_and_logits_and_the_same_trace(which: dict[str, Any]) -> None:
    model, inputs, trace = tiny_trace(which)
    assert_same(model, inputs, which, trace)
    again = record_inputs(model, Words, inputs, [replay_policy(trace)], STEPS)
    assert without_scores(again) == without_scores(trace)


def test_a_file_written_before_there_were_sizes_replays_as_ever() -> None:
    sparse = {"use": "sparsevlm/text-guided", "keep": {3: 4}, "recycle_share": 0.6, "cluster_size": 2}
    trace = Trace.load(Path(__file__).parents[2] / "data/trace/before-sizes.json")
    model, inputs, _ = tiny_trace(HIDROP)
    assert trace.runs[0].encode[0].images[0].sizes is None
    assert trace.runs[0].boundaries[-1].merged_by is None
    assert_same(model, inputs, policy(merge=ENCODE["merge"], keys=ENCODE["keys"], guided=sparse), trace)


def test_rows_put_in_anew_lose_their_sizes_in_the_replay_too() -> None:
    class Renewed(Stage[Any]):
        """Puts every row in the place of itself, and says nothing of its size."""

        encode_at = (1,)

        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            shares = tuple(torch.eye(len(features)) for features in call.features)
            return Encode(rows=call.features, places=call.places, shares=lambda: shares)

    which = policy(tome={"use": "tome/token-merging", "r": 6, "layers": 1}, renewed={"use": Renewed})
    model, inputs, trace = tiny_trace(which)
    assert trace.runs[0].encode[1].images[0].merged == []
    assert max(trace.runs[0].encode[0].images[0].sizes or []) > 1
    assert_same(model, inputs, which, trace)


def test_a_token_that_outlives_the_exit_does_so_again() -> None:
    exit_at_4 = {"use": "hidrop/early-exit", "at": 4, "keep_last": True}
    which = policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 6}}, exit=exit_at_4)
    model, inputs, trace = tiny_trace(which, parts=((3, "I"),))
    assert [layer.visual_tokens for layer in trace.runs[0].layers] == [16, 16, 6, 6, 1, 1]
    assert_same(model, inputs, which, trace)


def without_scores(trace: Trace) -> dict[str, Any]:
    """The trace as data, less what a replay has no say about."""

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: stripped(v) for k, v in value.items() if k not in ("scores", "notes", "name")}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    data: dict[str, Any] = stripped(trace.model_dump())
    for run in data["runs"]:
        for call in run["calls"]:  # without notes, layers that lost the same stand together
            each = {layer: e["tokens"] for e in call["evicted"] for layer in e["layers"]}
            call["evicted"] = sorted(each.items())
    return data


THREE_LAYERS = ["stages.merge.layers=3", "stages.merge.r=16"]
"""The embedded model's vision tower is shallow."""


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, []) for name in ("hidrop-64", "mustdrop-digits", "mixed-digits", "digits-mild", "sparsevlm-128")),
        *((name, []) for name in ("visionzip-128", "prumerge", "prumerge-plus")),
        ("tome-r16", THREE_LAYERS),
    ],
)
def test_published_policies_on_the_embedded_model(name: str, overrides: list[str]) -> None:
    model, processor = load()
    picture = sample_image()
    pictures = [picture, ImageOps.mirror(picture)] if name == "mixed-digits" else [picture]
    question = "read all digits row by row ."
    which = load_policy(name, ["rescale=true", *overrides])
    trace = record(model, processor, pictures, question, [which], STEPS)
    assert_same(model, build_inputs(processor, [(pictures, question)]), which, trace)


@torch.no_grad()
def test_keeps_are_forced_whatever_the_scores_say() -> None:
    _, inputs, trace = tiny_trace(HIDROP)
    other = tiny_llava(seed=3)
    kept = torch.tensor([i for n, image in enumerate(trace.prompt.images)
                         for i in (image.index[p] for p in trace.runs[0].boundaries[0].kept[n])])  # fmt: skip
    with dropflow.attach(other, HIDROP) as flow:
        other(**inputs)
        own = flow.live()[2, 0]
    with dropflow.attach(other, replay_policy(trace)) as flow:
        other(**inputs)
        forced = flow.live()[2, 0]
    visual = inputs["input_ids"][0] == 98
    assert (forced & visual).nonzero()[:, 0].tolist() == kept.tolist()
    assert not torch.equal(own, forced)


def test_what_if_a_patch_had_stayed_or_gone() -> None:
    which = policy(pyramid={"use": "hidrop/concave-pyramid", "keep": {2: 6, 4: 3}})
    model, inputs, trace = tiny_trace(which)
    run = trace.runs[0]
    lost = next(p for p in range(16) if p not in run.boundaries[0].kept[1])
    stays = record_inputs(model, Words, inputs, [replay_policy(keep_patches(trace, [lost], image=1))], 1).runs[0]
    assert [b.kept[1] for b in stays.boundaries] == [sorted([*b.kept[1], lost]) for b in run.boundaries]
    assert [b.kept[0] for b in stays.boundaries] == [b.kept[0] for b in run.boundaries]
    assert [layer.visual_tokens for layer in stays.layers] == [32, 32, 13, 13, 7, 7]
    goes = drop_patches(trace, [lost, run.boundaries[-1].kept[1][0]], image=1, at=1)
    gone = record_inputs(model, Words, inputs, [replay_policy(goes)], 1).runs[0]
    assert [layer.visual_tokens for layer in gone.layers] == [32, 30, 11, 11, 5, 5]
    assert [own.stage for own in gone.boundaries[0].by] == ["edit"]


def test_a_patch_that_stays_is_kept_by_encoder_and_caches_too() -> None:
    which = policy(r={"use": "control/random", "encode": 9})
    model, inputs, trace = tiny_trace(which)
    lost = next(p for p in range(16) if p not in trace.entering(trace.runs[0])[0])
    kept = keep_patches(trace, [lost])
    stays = record_inputs(model, Words, inputs, [replay_policy(kept)], 1).runs[0]
    assert {layer.visual_tokens for layer in stays.layers} == {19}
    model, inputs, trace = tiny_trace(policy(**EVICTS))
    index = trace.prompt.images[0].index
    evicted = {token for call in trace.runs[0].calls[1:] for e in call.evicted for token in e.tokens}
    patch = next(p for p, token in enumerate(index) if token in evicted)
    before, after = trace, record_inputs(model, Words, inputs, [replay_policy(keep_patches(trace, [patch]))], STEPS)
    held = [sum(call.kv_entries) for call in before.runs[0].calls[-1:]]
    assert sum(after.runs[0].calls[-1].kv_entries) > held[0]


def after(model: Any, inputs: Any, trace: Trace) -> TracedRun:
    """What a replay of a trace does."""
    return record_inputs(model, Words, inputs, [replay_policy(trace)], STEPS).runs[0]


@pytest.mark.parametrize(
    "which",
    [
        policy(tome={"use": "tome/token-merging", "r": 3, "layers": 2}),
        policy(merge=ENCODE["merge"]),
        policy(zip={"use": "visionzip/dominant-contextual", "dominant": 5, "contextual": 3}),
    ],
    ids=["tome", "windows", "visionzip"],
)
def test_the_token_of_a_merged_patch_stays_or_goes_wherever_its_row_is(which: dict[str, Any]) -> None:
    model, inputs, trace = tiny_trace(
        policy(**which["stages"], pyramid={"use": "hidrop/concave-pyramid", "keep": {3: 4}})
    )
    run, entering = trace.runs[0], follow(trace, trace.runs[0], 1).entering
    boundary = run.boundaries[0]
    lost = next(p for p in range(16) if entering[p] not in boundary.kept[1] and entering.count(entering[p]) > 1)
    stays = after(model, inputs, keep_patches(trace, [lost], image=1))
    assert stays.boundaries[0].kept == [boundary.kept[0], sorted([*boundary.kept[1], entering[lost]])]
    assert stays.encode == without_scores_of(run.encode)
    kept = next(p for p in range(16) if entering[p] in boundary.kept[1])
    goes = after(model, inputs, drop_patches(trace, [kept], image=1, at=3))
    assert goes.boundaries[0].kept == [boundary.kept[0], [p for p in boundary.kept[1] if p != entering[kept]]]


def without_scores_of(steps: Any) -> Any:
    """Encode steps less what a replay has no say about."""
    return [s.model_copy(update={"images": [i.model_copy(update={"scores": None}) for i in s.images]}) for s in steps]


def test_a_patch_that_the_encoder_dropped_gets_a_row_of_its_own_again() -> None:
    which = policy(zip={"use": "visionzip/dominant-contextual", "dominant": 6, "contextual": 0})
    model, inputs, trace = tiny_trace(which)
    found = follow(trace, trace.runs[0], 0).entering
    first, last = found.index(-1), 15 - found[::-1].index(-1)
    assert first != last
    run = after(model, inputs, keep_patches(trace, [first, last]))
    (image, other), before = run.encode[0].images, trace.runs[0].encode[0].images[0]
    assert len(image.kept) == len(before.kept) + 2 == len(other.kept) + 2
    told = Trace.model_validate(trace.model_dump() | {"runs": [run.model_dump()]})
    again = follow(told, run, 0).entering
    assert {first, last} == {p for p in range(16) if again[p] != -1 and found[p] == -1}
    assert image.sizes == [1.0] * 8
    assert {layer.visual_tokens for layer in run.layers} == {14}


def test_a_patch_merged_inside_the_llm_stays_on_its_own_and_centres_can_go() -> None:
    model, inputs, trace = tiny_trace(POLICIES["clusters inside the LLM"])
    boundary = trace.runs[0].boundaries[0]
    assert boundary.merged_by == "guided"
    cluster = max(boundary.merged[0], key=lambda merge: len(merge.of))
    member = next(p for p in cluster.of if p != cluster.into)
    stays = after(model, inputs, keep_patches(trace, [member]))
    assert stays.boundaries[0].kept[0] == sorted([*boundary.kept[0], member])
    assert [m.of for m in stays.boundaries[0].merged[0] if m.into == cluster.into] == [
        of for of in [[p for p in cluster.of if p != member]] if len(of) > 1
    ]
    early = after(model, inputs, drop_patches(trace, [cluster.into], at=1))
    assert cluster.into not in early.boundaries[0].kept[0]
    assert cluster.into not in [merge.into for merge in early.boundaries[1].merged[0]]
    late = after(model, inputs, drop_patches(trace, [member], at=3))  # its state is in another token by then
    assert late.boundaries[1].kept[0] == [p for p in boundary.kept[0] if p != cluster.into]


def test_a_token_that_changed_places_is_followed_to_the_new_one() -> None:
    *_, trace = tiny_trace(POLICIES["clusters after the survivors"])
    boundary = trace.runs[0].boundaries[0]
    moved = {merge.of[0]: merge.into for merge in boundary.merged[0] if len(merge.of) == 1}
    assert moved
    assert {*moved, *moved.values()} <= set(boundary.kept[0]), "survivors move among the places that are left"
    standing = follow_on(range(16), boundary, 0)
    assert [standing[patch] for patch in moved] == list(moved.values())
    assert {standing[p] for merge in boundary.merged[0] for p in merge.of if p not in moved} <= set(boundary.kept[0])


def test_edits_that_cannot_be() -> None:
    *_, trace = tiny_trace(policy(**ENCODE))
    run = trace.runs[0]
    shielded = follow(trace, run, 0).entering.index(trace.protected(run)[0][0])
    with pytest.raises(InputError, match=f"patch {shielded}: an encode stage protects it"):
        drop_patches(trace, [shielded])
    for call, told in (
        (lambda: keep_patches(trace, [16]), "image 0 has patches 0 to 15"),
        (lambda: keep_patches(trace, [1], image=2), "images 0 to 1"),
        (lambda: drop_patches(trace, [1], at=6), "live from boundary 0 to before 6"),
    ):
        with pytest.raises(InputError, match=told):
            call()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("17", (0, [17], None)), ("1/17,18", (1, [17, 18], None)), ("17@6", (0, [17], 6)), ("2/3, 4@5", (2, [3, 4], 5))],
)
def test_patches_as_text(text: str, expected: Any) -> None:
    assert read_patches(text, "--drop") == expected


@pytest.mark.parametrize("text", ["", "x", "1/", "3@", "1,,2", "5@6"])
def test_patches_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InputError, match="--keep: expected patches such as 17,18"):
        read_patches(text, "--keep")


MISFITS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], str]] = {
    "another depth": (lambda: tiny_llava(layers=4), lambda: prompt((("I", 2, "I", 9),)), "a model of 6 layers"),
    "fewer images": (tiny_llava, lambda: prompt(((3, "I", 5),)), "2 images, but"),
    "images elsewhere": (tiny_llava, lambda: prompt(((4, "I", 2, "I", 9),)), "in other places"),
    "a smaller grid": (lambda: tiny_llava(grid=3), lambda: prompt((("I", 2, "I", 9),), grid=3), "patch|other places"),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("which", [HIDROP, policy(**ENCODE)], ids=["prune", "encode"])
def test_a_trace_that_does_not_fit_is_refused(misfit: Any, which: dict[str, Any]) -> None:
    build, inputs, told = misfit
    *_, trace = tiny_trace(which)
    model = build()
    plain = model(**inputs()).logits
    with pytest.raises((PolicyError, DecisionError), match=told), dropflow.attach(model, replay_policy(trace)):
        model(**inputs())
    assert torch.equal(model(**inputs()).logits, plain)


def test_rows_of_unknown_origin_are_traced_but_not_replayed() -> None:
    class Halved(Stage[Any]):
        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            rows = tuple(features[::2] + 1 for features in call.features)
            return Encode(rows=rows, places=tuple(places[::2] for places in call.places))

    *_, trace = tiny_trace(policy(half={"use": Halved}))
    assert trace.entering(trace.runs[0]) == [list(range(0, 16, 2))] * 2
    with pytest.raises(PolicyError, match=r"stages\.half: replaced rows .*`Encode\.shares`"):
        dropflow.attach(tiny_llava(), replay_policy(trace))
    with pytest.raises(PolicyError, match="run: expected 0 to 0, got 1"):
        replay_policy(trace, 1)


def test_weighted_sums_are_made_again() -> None:
    class Blended(Stage[Any]):
        @hookimpl
        def encode(self, call: EncodeCall) -> Encode:
            count = len(call.features[0])
            weights = torch.rand(count // 2, count, generator=torch.Generator().manual_seed(0))
            weights = torch.where(weights < 0.7, 0, weights)
            weights[0] = 0
            weights[0, 3] = 0.5
            rows = tuple(weights @ features for features in call.features)
            places = tuple(own[1::2] for own in call.places)
            return Encode(rows=rows, places=places, shares=lambda: tuple(weights for _ in call.features))

    which = policy(blend={"use": Blended}, pyramid={"use": "hidrop/concave-pyramid", "keep": {3: 4}})
    model, inputs, trace = tiny_trace(which)
    first = (trace.runs[0].encode[0].images[0].merged or [])[0]
    assert (first.into, first.of, first.shares) == (1, [3], [0.5])
    assert_same(model, inputs, which, trace)
