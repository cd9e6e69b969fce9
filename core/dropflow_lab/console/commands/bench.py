"""`dropflow bench`: measure the engine and the stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dropflow_lab.console.commands import (
    bench_compiled,
    bench_efficiency,
    bench_reuse,
    bench_serving,
    bench_training,
    bench_videos,
)
from dropflow_lab.console.commands.options import AsJson, Threads
from dropflow_lab.console.commands.output import chatter_to_stderr, emit

if TYPE_CHECKING:
    from rich.table import Table

    from dropflow_lab.bench.decode import DecodeBench
    from dropflow_lab.bench.engine import EngineBench
    from dropflow_lab.bench.overlap import OverlapBench
    from dropflow_lab.bench.recall import RecallBench
    from dropflow_lab.bench.stages import StageBench
    from dropflow_lab.measure.intervals import Gain, Share
    from dropflow_lab.measure.machine import Machine
    from dropflow_lab.measure.timing import Spread

app = typer.Typer(help="Measure what the engine and the stages cost and save; `dropflow compare` measures policies.")

app.command("train")(bench_training.train)
app.command("gpu")(bench_training.gpu)
app.command("compiled")(bench_compiled.compiled)
app.command("reuse")(bench_reuse.reuse)
app.command("serve")(bench_serving.serve)
app.command("video")(bench_videos.video)

_QUICK_ROUNDS = 3

Repeats = Annotated[int, typer.Option(min=2, help="Rounds; every variant is timed once in each.")]
Quick = Annotated[bool, typer.Option("--quick", help=f"{_QUICK_ROUNDS} rounds: a smoke test, too few to report.")]


@app.callback()
def main() -> None:
    """Measure what the engine and the stages cost and save; `dropflow compare` measures policies."""


@app.command("engine")
def engine(
    repeats: Repeats = 15,
    visual_tokens: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Comma-separated square numbers: instead, only the efficiency of a prefill with images of these "
            "sizes, beside the same layers run without an engine.",
        ),
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="With --visual-tokens: prompts at once; their lengths differ.")] = 1,
    threads: Threads = 1,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Time a random model of 16 layers on 576 visual and 64 text tokens, without and with policies, in turn.

    `noop`: a stage that is called before every layer and keeps everything. `empty`: a policy without stages.
    `control`: a second model without a policy, which shows how far a ratio strays from 1 by chance. `reduced`: vision
    enters at layer 4; 140 tokens are left from layer 5, 9 from layer 8, none from layer 11 (88.9 % fewer on average).
    `ragged`: a batch of two lengths from which a few tokens are dropped, also on a tiny model. Efficiency is the
    speed-up divided by the FLOPs ratio. All are medians with quartiles over the rounds.

    With `--visual-tokens`, in CPU time: `reduced` and PyramidDrop, scaled to the size. `bare` are the same layers run
    by hand on as many tokens, which shows what the machine allows.
    """
    from dropflow_lab.bench.engine import bench_engine

    rounds = _QUICK_ROUNDS if quick else repeats
    if visual_tokens or batch > 1:
        bench_efficiency.show(visual_tokens, batch, rounds=rounds, threads=threads, as_json=as_json)
        return
    with chatter_to_stderr():
        measured = bench_engine(rounds=rounds, threads=threads)
    emit(measured.to_json(), as_json, _table(measured), _summary(measured))


@app.command("recall")
def recall(
    questions: Annotated[int, typer.Option(min=1, help="Pictures, each with two questions.")] = 300,
    model: Annotated[str, typer.Option(help="Embedded model.")] = "conversations",
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Ask the embedded model two questions about each picture in one conversation, with and without recall.

    The policy keeps the 10 of 144 visual tokens that the question reads most. Shows the accuracy of the second question
    asked first and asked second; 95 % intervals.
    """
    from dropflow_lab.bench.recall import bench_recall

    with chatter_to_stderr():
        measured = bench_recall(questions, model=model, threads=threads)
    emit(measured.to_json(), as_json, _recall_table(measured), _recall_summary(measured))


@app.command("stages")
def stages(
    repeats: Repeats = 7,
    threads: Threads = 1,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Time the selection of every shipped stage for pictures, and what its policy saves of the prefill.

    On a random model of 32 layers, 576 visual and 64 text tokens, every policy in turn. Both are shares of the time of
    a prefill without a policy; the saving is net of selection. All are medians with quartiles.
    """
    from dropflow_lab.bench import stages as bench

    with chatter_to_stderr():
        measured = bench.bench_stages(rounds=_QUICK_ROUNDS if quick else repeats, threads=threads)
    emit(measured.to_json(), as_json, _stage_table(measured), _stage_summary(measured))


@app.command("overlap")
def overlap(
    repeats: Repeats = 15,
    threads: Threads = 1,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Time a prefill whose images are encoded before the decoder, and beside the layers before vision enters, in turn.

    A random model of 16 layers, 1024 text and 576 visual tokens; vision enters at layer 8. `saved` is the difference,
    also as a share of the smaller part of the two that can overlap. `both cores` encodes first, on twice as many
    threads. Measure on a quiet machine with at least two cores for each thread. All are medians with quartiles.
    """
    from dropflow_lab.bench.overlap import bench_overlap

    with chatter_to_stderr():
        measured = bench_overlap(rounds=_QUICK_ROUNDS if quick else repeats, threads=threads)
    emit(measured.to_json(), as_json, _overlap_table(measured), _overlap_summary(measured))


def _overlap_table(measured: OverlapBench) -> Table:
    from rich.table import Table

    table = Table("measure", "median", "quartiles", title="one prefill")
    rows: dict[str, tuple[Spread, str]] = {
        "serial, ms": (measured.serial_ms, ".1f"),
        "of these in the encoder, ms": (measured.vision_ms, ".1f"),
        "of these in the layers before vision enters, ms": (measured.text_only_ms, ".1f"),
        "overlap, ms": (measured.overlap_ms, ".1f"),
        "serial on both cores, ms": (measured.both_cores_ms, ".1f"),
        "serial, CPU ms of the calling thread": (measured.serial_caller_cpu_ms, ".1f"),
        "overlap, CPU ms of the calling thread": (measured.overlap_caller_cpu_ms, ".1f"),
        "saved, ms": (measured.saved_ms, ".1f"),
        "saved, of what can be saved": (measured.saved_share, ".1%"),
        "speed-up over serial": (measured.speedup, ".3f"),
        "speed-up over serial on both cores": (measured.speedup_over_both_cores, ".3f"),
    }
    for name, (spread, form) in rows.items():
        table.add_row(name, f"{spread.median:{form}}", f"{spread.low:{form}} .. {spread.high:{form}}")
    return table


def _overlap_summary(measured: OverlapBench) -> str:
    bits = "the same bits" if measured.same_bits else "OTHER BITS"
    return f"both give {bits}\n{_circumstances(measured.rounds, measured.machine)}"


@app.command("decode")
def decode(
    share: Annotated[
        float, typer.Option(min=1e-4, max=1, help="Share of the visual entries that a step reads.")
    ] = 0.05,
    repeats: Repeats = 15,
    threads: Threads = 1,
    wall: Annotated[
        bool, typer.Option("--wall", help="Time by the clock, not by the CPU time of the process.")
    ] = False,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Time a decode step over 9,216 visual and 64 text tokens on a random model of 16 layers.

    Every variant in turn, as ratios to the model without a policy. `everything`: a policy holds the cache, chooses in
    every step, and reads all. `late`: from the published share of depth on (17 of 36), steps read the share. `early`:
    from layer 2 on. `control`: a second model without a policy. All are medians with quartiles over the rounds.
    """
    from dropflow_lab.bench.decode import bench_decode

    with chatter_to_stderr():
        measured = bench_decode(rounds=_QUICK_ROUNDS if quick else repeats, share=share, threads=threads, wall=wall)
    emit(measured.to_json(), as_json, _decode_table(measured), _decode_summary(measured))


def _table(measured: EngineBench) -> Table:
    from rich.table import Table

    table = Table("measure", "median", "quartiles", title="ratios to the same model without a policy")
    reduced = measured.reduced
    rows: dict[str, Spread] = {
        "noop: prefill time": measured.noop.prefill_ratio,
        "noop: decode step time": measured.noop.decode_ratio,
        "empty: prefill time": measured.empty.prefill_ratio,
        "empty: decode step time": measured.empty.decode_ratio,
        "control: prefill time": measured.control.prefill_ratio,
        "control: decode step time": measured.control.decode_ratio,
        "reduced: prefill speed-up": reduced.prefill_speedup,
        "reduced: efficiency": reduced.efficiency,
        "ragged: decode step time": measured.ragged.decode_ratio,
        "ragged, tiny model: decode step time": measured.ragged.tiny_decode_ratio,
    }
    for name, spread in rows.items():
        table.add_row(name, f"{spread.median:.3f}", f"{spread.low:.3f} .. {spread.high:.3f}")
    table.add_row("reduced: FLOPs ratio", f"{reduced.flops_ratio:.3f}", "")
    attach = measured.attach_ms
    table.add_row("attach, in ms", f"{attach.median:.1f}", f"{attach.low:.1f} .. {attach.high:.1f}")
    return table


def _summary(measured: EngineBench) -> str:
    return (
        f"KV entries per layer: {' '.join(map(str, measured.reduced.kv_entries))}\n"
        f"{_circumstances(measured.rounds, measured.machine)}"
    )


def _recall_table(measured: RecallBench) -> Table:
    from rich.table import Table

    table = Table("", "asked first", "asked second", "difference", title="accuracy of the second question")
    for row in measured.rows:
        table.add_row(row.name, *(_interval(one) for one in (row.asked_first, row.asked_second, row.loss)))
    return table


def _recall_summary(measured: RecallBench) -> str:
    return (
        f"in the second turn, recall gains {_interval(measured.gain)}; a conversation parks "
        f"{measured.parked_bytes} bytes\n{measured.questions} pictures; {measured.model}"
    )


def _interval(value: Share | Gain) -> str:
    return f"{value.value:.1%} ({value.low:.1%} .. {value.high:.1%})"


def _decode_table(measured: DecodeBench) -> Table:
    from rich.table import Table

    table = Table("variant", "median", "quartiles", title="time of a decode step over that without a policy")
    for name in ("everything", "late", "early", "control"):
        spread: Spread = getattr(measured, name)
        table.add_row(name, f"{spread.median:.3f}", f"{spread.low:.3f} .. {spread.high:.3f}")
    return table


def _decode_summary(measured: DecodeBench) -> str:
    read = "; ".join(
        f"{name}: {' '.join(f'{one:.0f}' for one in entries)}" for name, entries in measured.entries_read.items()
    )
    plain = measured.plain_ms
    return (
        f"entries read per layer: {read}\n"
        f"a step without a policy: {plain.median:.1f} ms ({plain.low:.1f} .. {plain.high:.1f}), {measured.clock}\n"
        f"{_circumstances(measured.rounds, measured.machine)}"
    )


def _stage_table(measured: StageBench) -> Table:
    from rich.table import Table

    table = Table(title="shares of the time of a prefill without a policy")
    for column in ("stage", "run as", "selection", "saving", "largest tensor"):
        table.add_column(column, overflow="fold", justify="left" if column in ("stage", "run as") else "right")
    for row in measured.rows:
        shares = (row.selection_share_of_dense_prefill, row.saving_share_of_dense_prefill)
        table.add_row(row.stage, row.policy, *(_percent(share) for share in shares), str(row.largest_tensor))
    return table


def _stage_summary(measured: StageBench) -> str:
    return (
        f"a full attention map, all tokens by all tokens, would hold {measured.square_map} elements\n"
        f"{_circumstances(measured.rounds, measured.machine)}"
    )


def _percent(share: Spread) -> str:
    return f"{share.median:.2%} ({share.low:.2%} .. {share.high:.2%})"


def _circumstances(rounds: int, machine: Machine) -> str:
    return (
        f"{rounds} rounds on {machine.threads} thread(s) of {machine.cpu}; "
        f"torch {machine.torch}, transformers {machine.transformers}"
    )
