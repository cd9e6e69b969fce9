"""Measurements of the engine itself and of the shipped stages, on random weights."""

from dropflow_lab.bench.efficiency import EfficiencyBench, bench_efficiency
from dropflow_lab.bench.engine import EngineBench, bench_engine
from dropflow_lab.bench.overlap import OverlapBench, bench_overlap
from dropflow_lab.bench.stages import StageBench, bench_stages
from dropflow_lab.bench.train import TrainBench, bench_train
from dropflow_lab.bench.video import VideoBench, bench_video

__all__ = [
    "EfficiencyBench",
    "EngineBench",
    "OverlapBench",
    "StageBench",
    "TrainBench",
    "VideoBench",
    "bench_efficiency",
    "bench_engine",
    "bench_overlap",
    "bench_stages",
    "bench_train",
    "bench_video",
]
