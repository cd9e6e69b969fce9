"""Measurements of the engine itself, on random weights."""

from dropflow_lab.bench.engine import EngineBench, bench_engine

__all__ = ["EngineBench", "bench_engine"]
