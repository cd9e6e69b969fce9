"""Measurements of the engine itself and of the shipped stages, on random weights."""

from dropflow_lab.bench.engine import EngineBench, bench_engine
from dropflow_lab.bench.stages import StageBench, bench_stages
from dropflow_lab.bench.train import TrainBench, bench_train

__all__ = ["EngineBench", "StageBench", "TrainBench", "bench_engine", "bench_stages", "bench_train"]
