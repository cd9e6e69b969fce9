"""Checks what an adapter states about reading a vision tower, without any knowledge of the family."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from dropflow.backbone.image_layout import ImageLayout
from dropflow.backbone.vision_reader import VisionReader
from dropflow.engine.attach.attach import attach
from dropflow.errors import DropflowError
from dropflow.lifecycle.hooks import hookimpl
from dropflow.lifecycle.payloads import EncodeCall
from dropflow.lifecycle.stage import Stage
from dropflow.testing.case import BrokenGuarantee, Case, relative_error
from dropflow.testing.probes import policy, use

FACT = "vision_attention"
SHOWN = ("received_attention", "cls_attention", "unit_keys")
"""What stages after the projector may ask of a tower."""


class Reads(Stage[Any]):
    """Records what every layer of the tower shows of every row after the projector, and decides nothing."""

    needs = frozenset({FACT})
    depth, first = 1, 0

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.seen: list[dict[str, tuple[Tensor, ...]]] = []
        """Values for the rows of each image, by what was asked and the layer, for each call of the tower."""

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """All layers."""
        return tuple(range(self.first, self.depth))

    @hookimpl
    def encode(self, call: EncodeCall) -> None:
        """Ask for everything."""
        asked = [name for name in SHOWN if call.has_cls or name != "cls_attention"]
        self.seen.append({f"{name}({i})": getattr(call, name)(i) for name in asked for i in self.vision_taps})


@dataclass
class Encoded:
    """One call of the method that encodes a modality, without a policy."""

    modality: str
    reader: VisionReader
    arguments: Mapping[str, Any]
    entries: Sequence[Tensor] = ()
    """Rows (rows, dim) of each entry of the features."""
    last: Tensor | None = None
    """Rows of the tower that are handed on, as a leaf of the graph."""
    members: Sequence[Tensor] = ()
    """For every row of the features, the rows of the tower that change it."""
    weights: Sequence[Tensor] = ()
    """For every row of the features, the stated weights of these rows."""
    calls: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """Attention map (batch, heads, rows, rows) and keys of every eager computation in each layer."""

    def flat(self, what: str, layer: int) -> Tensor:
        """What a layer says of every row of the tower, from its whole maps."""
        prefix, pictures = self.reader.prefix, self.reader.pictures
        if what == "unit_keys":
            return torch.cat([key.mean(1).flatten(0, 1) for _, key in self.calls[layer]])
        if what == "cls_attention":
            return torch.cat([weights.mean(1)[:, 0].flatten() for weights, _ in self.calls[layer]])
        counts = None if pictures is None else torch.tensor(list(pictures(self.arguments)))
        if counts is None or self.reader.padded:
            ((weights, _),) = self.calls[layer]
            patches = weights.shape[-1] - prefix
            counts = torch.full((len(weights),), patches) if counts is None else counts
            asks = torch.arange(patches) < counts[:, None]
            batch = (weights.mean(1)[:, prefix:] * asks[..., None]).sum(1)
            return (batch / counts[:, None]).flatten()
        sums = [weights.mean(1)[:, prefix:].sum(1) for weights, _ in self.calls[layer]]
        return torch.cat([own.flatten() for own in sums]) / counts.repeat_interleave(counts)


def check_reader(case: Case) -> None:
    """Check the tables of the adapter's `reader`, and what stages are told under sdpa and eager attention.

    The members of every row must be the rows of the tower that change it, by its Jacobian, and what stages read must
    be the mean over them, by their stated weights, of sums of the whole maps. Nothing is checked for modalities without
    a reader. Raises `BrokenGuarantee`, naming what differs.
    """
    eager = replace(case, attention="eager").model
    found = _encoded(case, eager)
    for encoded in found:
        encoded.members = list(_jacobian(encoded))
        try:
            _check_members(case, encoded)
        except (DropflowError, RuntimeError, IndexError) as error:
            raise _wrong(case, encoded.modality, f"cannot be evaluated: {error!r}") from error
        _check_pictures(case, encoded)
    if FACT not in case.adapter(case.model).facts():
        return
    for model in (case.model, eager):
        _check_shown(case, model, found)


def _check_members(case: Case, encoded: Encoded) -> None:
    tables = encoded.reader.members([len(rows) for rows in encoded.entries], encoded.arguments)
    stated = [row[row >= 0].unique() for table in tables for row in table]
    if len(stated) != len(encoded.members):
        raise _wrong(case, encoded.modality, f"states {len(stated)} rows, the features have {len(encoded.members)}")
    for number, (own, true) in enumerate(zip(stated, encoded.members, strict=True)):
        if not torch.equal(own, true):
            what = f"row {number} of the features is made of the tower's rows {true.tolist()}, it says {own.tolist()}"
            raise _wrong(case, encoded.modality, what)
    encoded.weights = _weights(encoded, tables)


def _weights(encoded: Encoded, tables: Sequence[Tensor]) -> list[Tensor]:
    """For every row of the features, the weights of its members, in ascending order of these."""
    stated = encoded.reader.weights
    if stated is None:
        return [torch.ones(len(own)) for own in encoded.members]
    found = []
    for table, weights in zip(tables, stated([len(rows) for rows in encoded.entries], encoded.arguments), strict=True):
        for row, weight in zip(table, weights, strict=True):
            found.append(weight[row >= 0][row[row >= 0].argsort()])
    return found


def _check_pictures(case: Case, encoded: Encoded) -> None:
    """A picture of a packed tower is what attends only to itself, and in some layer to all of itself."""
    if encoded.reader.pictures is None:
        return
    counts = list(encoded.reader.pictures(encoded.arguments))
    if encoded.reader.padded:
        for (weights, _), *_ in encoded.calls.values():
            seen = (weights.mean(1)[:, 0] > 0).sum(1).tolist()
            if seen != counts:
                raise _wrong(case, encoded.modality, f"`pictures` has {counts} rows, but a row attends to {seen}")
        return
    first = encoded.reader.first
    calls = [calls for layer, calls in encoded.calls.items() if layer >= first]
    maps = [_diagonal([weights.mean(1)[0] for weights, _ in own]) for own in calls]
    attends = torch.stack(maps).sum(0) > 0
    if sum(counts) != len(attends):
        what = f"`pictures` has {sum(counts)} rows, the tower {len(attends)}"
        raise _wrong(case, encoded.modality, what)
    if not torch.equal(attends, _diagonal([torch.ones(count, count) for count in counts]) > 0):
        what = f"the rows that attend to each other are not those of one of the `pictures` {counts}"
        raise _wrong(case, encoded.modality, what)


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return whole


@torch.no_grad()
def _check_shown(case: Case, model: Any, found: Sequence[Encoded]) -> None:
    backbone = case.adapter(model)
    depth = min((encoded.reader.depth for encoded in found), default=1)
    first = max((encoded.reader.first for encoded in found), default=0)
    kind = type("Reads", (Reads,), {"depth": depth, "first": first, "__doc__": Reads.__doc__})
    with attach(model, policy(read=use(kind)), adapter=case.adapter) as flow:
        model(**case.inputs)
        seen_by = cast(Reads, flow.plan.stages[0][1]).seen
    for encoded, seen in zip(found, seen_by, strict=True):
        layouts = backbone.layouts(encoded.modality, [len(own) for own in encoded.entries], dict(encoded.arguments))
        for what, told in seen.items():
            name, layer = what.removesuffix(")").split("(")
            flat, start = encoded.flat(name, int(layer)), 0
            for image, layout in enumerate(layout for own in layouts for layout in own):
                own = slice(start, start + layout.tokens)
                expected = _means(flat, encoded.members[own], encoded.weights[own], layout)
                start += layout.tokens
                error = relative_error(told[image], expected)
                if error > case.tiny.tolerance:
                    how = model.config._attn_implementation
                    what = f"{what} of image {image} is {error:.1e} off the mean of its whole maps, under {how}"
                    raise _wrong(case, encoded.modality, what)


def _means(flat: Tensor, rows: Sequence[Tensor], weights: Sequence[Tensor], layout: ImageLayout) -> Tensor:
    patches = layout.patch_rows(flat.device).tolist()
    sums = [torch.tensordot(weights[patch].to(flat), flat[rows[patch]], 1) for patch in patches]
    return torch.stack([own / weights[patch].sum() for own, patch in zip(sums, patches, strict=True)])


def _jacobian(encoded: Encoded) -> Iterator[Tensor]:
    """For every row of the features, the rows of the tower that change it."""
    assert encoded.last is not None
    dice = torch.Generator().manual_seed(0)
    for row in torch.cat(list(encoded.entries)):
        total = row @ torch.randn(len(row), generator=dice)
        (slopes,) = torch.autograd.grad(total, encoded.last, retain_graph=True, materialize_grads=True)
        yield slopes.flatten(0, -2).abs().sum(-1).nonzero()[:, 0]


def _encoded(case: Case, model: Any) -> list[Encoded]:
    """Every call of the model's encoding methods that has a reader, watched, in a run without a policy."""
    backbone = case.adapter(model)
    core, found = backbone.core, cast(list[Encoded], [])

    def watched(modality: str, original: Any) -> Any:
        signature = inspect.signature(original)

        def get_features(*args: Any, **kwargs: Any) -> Any:
            reader = backbone.reader(modality)
            if reader is None or any(not encoded.entries for encoded in found):
                return original(*args, **kwargs)
            found.append(Encoded(modality, reader, signature.bind_partial(*args, **kwargs).arguments))
            with _watched(reader, found[-1]):
                output = original(*args, **kwargs)
            pooled = output.pooler_output
            entries = [pooled] if isinstance(pooled, Tensor) and pooled.dim() == 2 else list(pooled)
            found[-1].entries = [rows.flatten(0, -2) for rows in entries]
            return output

        return get_features

    with ExitStack() as stack, torch.enable_grad():
        for modality in backbone.modalities:
            name = f"get_{modality}_features"
            if hasattr(core, name):
                stack.enter_context(mock.patch.object(core, name, watched(modality, getattr(core, name))))
        model(**case.inputs)
    return found


@contextmanager
def _watched(reader: VisionReader, encoded: Encoded) -> Iterator[None]:
    """Record the layers' eager attention, and make the rows that are handed on a leaf of the graph."""
    layers = list(reader.owner._modules[reader.layers])
    now: list[int] = []
    boundary = len(layers) if reader.feature_layer is None else reader.feature_layer

    def leaf(_: Any, __: Any, output: Any) -> Any:
        encoded.last = (output if isinstance(output, Tensor) else output[0]).detach().requires_grad_()
        return encoded.last if isinstance(output, Tensor) else (encoded.last, *output[1:])

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(lambda *_, n=number: now.append(n)).remove)
            stack.callback(layer.register_forward_hook(lambda *_: now.clear()).remove)
        # transformers may capture the output with a hook of its own, installed at the tower's first call
        stack.callback(layers[boundary - 1].register_forward_hook(leaf, prepend=True).remove)
        for module in {sys.modules[type(part).__module__] for layer in layers for part in layer.modules()}:
            if hasattr(module, "eager_attention_forward"):
                recorded = _recording(module.eager_attention_forward, encoded, now)
                stack.enter_context(mock.patch.object(module, "eager_attention_forward", recorded))
        yield


def _recording(eager: Any, encoded: Encoded, now: Sequence[int]) -> Any:
    def forward(module: Any, query: Tensor, key: Tensor, *rest: Any, **kwargs: Any) -> Any:
        output, weights = eager(module, query, key, *rest, **kwargs)
        if now:
            encoded.calls.setdefault(now[0], []).append((weights.detach(), key.detach()))
        return output, weights

    return forward


def _wrong(case: Case, modality: str, what: str) -> BrokenGuarantee:
    return BrokenGuarantee(
        f"{case.name}: the fact '{FACT}' is wrong for {modality}s: {what}; see `reader` of {case.adapter.__name__}"
    )
