"""What attaching returns: a flow for one policy, or a set of flows from which each call chooses one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from dropflow.engine.attach import flow_view
from dropflow.engine.attach.model_hooks import ModelHooks
from dropflow.engine.attach.prefix import Prefix, make_prefix
from dropflow.engine.attach.stage_weights import load_weights, save_weights
from dropflow.engine.decoder.keeps import Keeps, keeps_of
from dropflow.engine.decoder.record import PromptRecord
from dropflow.engine.decoder.records import Forward, Records
from dropflow.engine.decoder.report import Report
from dropflow.engine.decoder.summary import summed_up
from dropflow.errors import UnsupportedCall, nearest, quoted
from dropflow.policy.plan import Plan
from dropflow.policy.policy import Policy
from dropflow.policy.policy_file import load_policy
from dropflow.policy.recorded import Recording


class Flow:
    """A policy attached to a model; as a context manager, it detaches when the block ends."""

    def __init__(self, plan: Plan, hooks: ModelHooks, recording: Recording | None, detach: Callable[[], None]) -> None:
        """Created by `dropflow.attach`; calling `detach` removes the policy from the model."""
        self._plan, self._hooks, self._recording, self._detach = plan, hooks, recording, detach
        self._records = Records(plan, hooks.backbone)
        self.trained = hooks.modules.trained_by(plan)
        """The modules of the policy's stages and how far their training has come; for the engine."""
        self.stage_loss: Tensor | None = None
        """The sum of the losses that stages returned in the last call, with its graph; `None` if there were none.

        A call with labels has already added it to the loss of the model. Add it yourself where you compute the loss
        from logits.
        """

    @property
    def policy(self) -> Policy:
        """The attached policy."""
        return self._plan.policy

    @property
    def plan(self) -> Plan:
        """The policy as resolved for this model."""
        return self._plan

    @property
    def attached(self) -> bool:
        """Whether the policy still applies to the model, or is one that its calls may choose."""
        return any(flow is self for flow in self._hooks.flows.values())

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The modules that the policy's stages train, by the names of the stages; empty for most policies."""
        return dict(self.trained.modules)

    @property
    def progress(self) -> float | None:
        """How far training has come, from 0 to 1, for stages that follow it; set it before every step."""
        return self.trained.progress

    @progress.setter
    def progress(self, done: float) -> None:
        """Raises `ValueError` for anything but a number from 0 to 1."""
        if not isinstance(done, int | float) or isinstance(done, bool) or not 0 <= done <= 1:
            raise ValueError(f"progress: expected a number from 0 to 1, got {quoted(done)}")
        self.trained.progress = float(done)

    def save_stages(self, folder: str | PathLike[str]) -> None:
        """Write the weights of the stages' modules into `folder`, as `model.save_pretrained` does beside the model's.

        For what is saved in another way, such as a low-rank adapter. Raises `UnsupportedCall` if there are none.
        """
        self._check_trained("save_stages")
        if not isinstance(folder, str | PathLike):
            raise UnsupportedCall(f"save_stages: expected a folder, got {quoted(folder)}")
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_weights(self._hooks.modules.states(None), folder)

    def load_stages(self, source: str | PathLike[str]) -> None:
        """Load the weights of the modules of all attached policies' stages, by name, from a folder or a file.

        Raises `PolicyError` where a weight is missing or does not fit, and `UnsupportedCall` if there are none to load.
        """
        self._check_trained("load_stages")
        if not isinstance(source, str | PathLike):
            raise UnsupportedCall(f"load_stages: expected a folder or a safetensors file, got {quoted(source)}")
        load_weights(self._hooks.modules, source)

    def _check_trained(self, what: str) -> None:
        if not self.trained.modules:
            raise UnsupportedCall(f"{what}: no stage of the policy {self.policy.name!r} has a module; leave it out")

    def learned_policy(self) -> Policy:
        """The policy with what its stages have learned as plain options, which needs no weights.

        Raises `UnsupportedCall` for a policy with a stage whose module no options can stand for, or without modules.
        """
        self._check_trained("learned_policy")
        data = self.policy.to_dict()
        for name, stage in self.plan.stages:
            module = self.trained.modules.get(name)
            options = None if module is None else stage.learned(module)
            if module is not None and options is None:
                raise UnsupportedCall(
                    f"learned_policy: stages.{name}: what it has learned is in its weights alone; keep the weights"
                )
            data["stages"][name] = {**data["stages"][name], **(options or {})}
        return load_policy(data)

    def __repr__(self) -> str:
        return flow_view.line(self, self._hooks.backbone)

    def _repr_html_(self) -> str:
        return flow_view.html(self, self._hooks.backbone)

    def report(self) -> Report:
        """Tokens per layer, FLOPs and KV bytes of the last prompt that brought images, and of its answer so far.

        A prompt is everything fed before decoding, in one forward or, as in chunked prefill, in several. Inside
        `generate`, the forwards of one prefill form a prompt; elsewhere, consecutive forwards on one cache that bring
        images or several tokens. Whatever follows on that cache is the answer. Raises `UnsupportedCall` if there was no
        such prompt, or if the policy has no stages, because then nothing is recorded.
        """
        return summed_up(self._last("report"))

    def live(self) -> Bool[Tensor, "layers batch tokens"]:
        """Which tokens of the last prompt with images were live before each layer; otherwise as `report`."""
        return self._last("live").live()

    def merges(self) -> Mapping[int, Int[Tensor, "batch tokens"]]:
        """For each boundary, the logical index of the token that each token was merged into, its own if it was not.

        Boundaries without merges are left out. Describes the last prompt that brought images; otherwise as `report`.
        """
        return self._last("merges").merges()

    def begins(self, cache: Any, seen: int | None = None) -> None:
        """Look at the cache of a forward that is about to run; called by the engine. See `Records.begin`."""
        self._records.begin(cache, seen)

    def noted(self, forward: Forward) -> None:
        """Record a forward; called by the engine."""
        self._records.add(forward)

    def _last(self, what: str = "report") -> PromptRecord:
        if self._plan.idle:
            raise UnsupportedCall(f"{what}: the policy {self.policy.name!r} has no stages, so nothing is recorded")
        last = self._records.last
        if last is None:
            raise UnsupportedCall(f"{what}: no prompt with images has run since the policy was attached; run one first")
        last.catch_up()
        last.follow(None if last.cache is None else int(last.cache.get_seq_length()))
        return last

    @contextmanager
    def visual(self, tokens: Bool[Tensor, "batch tokens"]) -> Iterator[None]:
        """State which tokens are visual, for prompts given as `inputs_embeds` that already contain image features.

        Without pixels nothing tells the images apart: where the adapter knows how many tokens an image has, so many are
        one, and otherwise each run of adjacent visual tokens is one, so that tiles and rows with tokens between them
        count as images of their own.

        Applies to this thread's calls with the same number of tokens, for every beam and returned sequence. Calls that
        continue a cache with another number of tokens, as in decoding, are taken as text; others raise
        `UnsupportedCall`.
        """
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.bool or tokens.dim() != 2:
            got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else quoted(tokens)
            raise UnsupportedCall(f"visual: expected a torch.bool tensor (batch, tokens), got {got}")
        with self._hooks.visual.let(self._hooks, tokens):
            yield

    def prefix(self, *, tokens: int | None = None, **inputs: Any) -> Prefix:
        """Run what questions about the same images share, so that each of them runs only the rest.

        `inputs` are those of one prompt without padding, with its images. The prefix is its first `tokens`, by default
        those up to the last visual one; what follows does not matter. Vision, and the layers before the first boundary
        at which a stage prunes, run on it once. Then `model.generate(**prefix.inputs(**others))` answers as if it had
        been asked anew, for prompts that begin with the same tokens.

        Raises `UnsupportedCall` for inputs that are no such prompt, and `UnsupportedModel` where layers have other
        states than the entries of a cache, or tokens see later ones.
        """
        return make_prefix(self, self._hooks, tokens, inputs)

    def keeps(self) -> tuple[Keeps, ...]:
        """What every sample of the last prompt with images kept, for `replay`; otherwise as `report`.

        Small (a number per visual token), and plain data by `Keeps.to_dict`. Raises `UnsupportedCall` for a policy with
        a `decode_cache` stage, whose decisions no single forward repeats.
        """
        self._check_replayable()
        return keeps_of(self._last("keeps"))

    @contextmanager
    def replay(self, keeps: Sequence[Keeps]) -> Iterator[None]:
        """Let this thread's prompts inside the block keep what `keeps` say, one for each sample, in order.

        The stages of the LLM are not asked; `encode` stages work as ever. For a forward over a rollout's prompt and
        answer, also while the model trains and in another process: its log-probabilities are those of the rollout.
        Samples may stand in other batches and with other padding. Raises `UnsupportedCall` as `keeps` does, and in a
        call whose prompts are not those that the keeps are of.
        """
        self._check_replayable()
        given = tuple(keeps) if isinstance(keeps, Iterable) else (keeps,)
        if not all(isinstance(own, Keeps) for own in given):
            raise UnsupportedCall(
                f"replay: expected `Keeps` of `flow.keeps()`, one for each sample, got {quoted(keeps)}; read plain "
                "data by `Keeps.from_dict`"
            )
        with self._hooks.replayed.let(self._hooks, given):
            yield

    def _check_replayable(self) -> None:
        evicts = self._plan.hooks.implementers("decode_cache")
        if evicts:
            raise UnsupportedCall(
                f"stages.{evicts[0][0]}: evicts or parks entries while answering, which no single forward can repeat; "
                "leave the stage out of rollouts that are to be replayed"
            )

    def record(self) -> None:
        """Keep the policy in the model's config after `detach`, so that models saved later also record it.

        Raises `PolicyError` for a policy that `attach` could not read back, such as one whose stages are not entry
        points of an installed package, and `UnsupportedCall` for a policy of a set other than its default.
        """
        if self.trained.modules:
            raise UnsupportedCall(
                f"record: stages.{next(iter(self.trained.modules))}: has trained weights, which leave the model with "
                "the policy; save the model while the policy is attached"
            )
        if self._recording is None:
            raise UnsupportedCall("record: a model's config holds one policy, the default of the set; record that one")
        self._recording.keep(self.policy)

    def detach(self) -> None:
        """Remove every hook from the model once any running forward has ended; does nothing if already detached.

        All policies of a set are detached together.
        """
        self._detach()

    def __enter__(self) -> Flow:
        if not self.attached:
            raise UnsupportedCall(
                f"flow: the policy {self.policy.name!r} was detached, and a flow cannot be reused after detach; call "
                "`dropflow.attach` again"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


class FlowSet(Mapping[str, Flow | None]):
    """Named policies attached to one model, of which each call chooses one; `None` runs the model without a policy.

    Maps names to flows. As a context manager, it detaches all of them when the block ends.
    """

    def __init__(self, flows: Mapping[str, Flow | None], hooks: ModelHooks, detach: Callable[[], None]) -> None:
        """Created by `dropflow.attach_set`."""
        self._flows, self._hooks, self._detach = dict(flows), hooks, detach

    def __getitem__(self, name: str) -> Flow | None:
        return self._flows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._flows)

    def __len__(self) -> int:
        return len(self._flows)

    @property
    def attached(self) -> bool:
        """Whether the model's calls still choose among these policies."""
        return bool(self._hooks.flows) and self._hooks.flows.keys() == self._flows.keys()

    def __repr__(self) -> str:
        return flow_view.set_line(self, self._hooks.backbone, self._hooks.traced.default.name)

    def _repr_html_(self) -> str:
        return flow_view.set_html(self, self._hooks.backbone, self._hooks.traced.default.name)

    @contextmanager
    def using(self, name: str) -> Iterator[Flow | None]:
        """Use the policy of this name for this thread's calls inside the block; yields its flow.

        Every call of one `generate` must run under the same policy. Raises `UnsupportedCall` for a name that is not in
        the set.
        """
        if not isinstance(name, str) or name not in self._flows:
            raise UnsupportedCall(f"using: no policy {quoted(name)} in this set; {nearest(str(name), self._flows)}")
        with self._hooks.choosing(name):
            yield self._flows[name]

    def detach(self) -> None:
        """Remove every hook from the model once any running forward has ended; does nothing if already detached."""
        self._detach()

    def __enter__(self) -> FlowSet:
        if not self.attached:
            raise UnsupportedCall(
                "flows: this set was detached, and cannot be reused after detach; call `dropflow.attach_set` again"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
