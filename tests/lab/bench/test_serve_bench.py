"""The benchmark of the server on a model of toy size: its counts, never its times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dropflow_lab.bench.load import Burst, Load, run

if TYPE_CHECKING:
    from dropflow_lab.bench.serve import ServeBench

for needed in ("starlette", "uvicorn", "python_multipart", "prometheus_client"):
    pytest.importorskip(needed, reason=f"{needed} is of the extra `serve`")


@pytest.fixture(scope="module")
def measured() -> ServeBench:
    from dropflow_lab.bench.serve import bench_serve

    return bench_serve("tiny", ["hidrop-64"], clients=(1, 3), requests=1, rounds=2, batch=2)


def test_every_policy_is_measured_at_every_number_of_clients(measured: ServeBench) -> None:
    assert [(row.clients, row.policy) for row in measured.rows] == [
        (1, "dense"), (1, "hidrop-64"), (3, "dense"), (3, "hidrop-64"),
    ]  # fmt: skip
    for row in measured.rows:
        tokens, requests = row.tokens_per_second, row.requests_per_second
        assert tokens.median == pytest.approx(16 * requests.median)  # every answer has the same length
        assert 0 < row.token_seconds.median < row.first_token_seconds.median * 16
        assert row.cpu_seconds.median > 0
        if row.policy == "dense":
            assert (row.gain.low, row.gain.high, row.cpu_gain.low, row.cpu_gain.high) == (1, 1, 1, 1)


def test_what_is_kept_of_a_gain_is_relative_to_the_fewest_clients(measured: ServeBench) -> None:
    gains = {row.clients: row.cpu_gain.median for row in measured.rows if row.policy == "hidrop-64"}
    assert measured.kept("hidrop-64") == {1: 1.0, 3: gains[3] / gains[1]}
    assert measured.kept("dense") == {1: 1.0, 3: 1.0}


def test_requests_that_fail_are_said() -> None:
    burst = run(Load(9, [{}], "none", clients=2, requests=3))  # nobody listens on the discard port
    assert isinstance(burst, Burst)
    assert len(burst.failed) == 3
    assert burst.first == []


def test_the_command_renews_its_table(cli, refused, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    assert "<!-- tiny -->" in refused("bench", "serve", "--subject", "tiny", "--into", page)
    page.write_text("# Page\n<!-- tiny -->\n<!-- end of tiny -->\nThe end.\n")
    options = ("--subject", "tiny", "--clients", "2,1", "--requests", 1, "--repeats", 2, "--policies", "hidrop-64")
    told = json.loads(cli("bench", "serve", *options, "--into", page, "--json").stdout)
    assert [(row["clients"], row["policy"]) for row in told["rows"]][2:] == [(2, "dense"), (2, "hidrop-64")]
    text = page.read_text()
    assert "| 2 | hidrop-64 |" in text
    one, two = (row["cpu_gain"]["median"] for row in told["rows"] if row["policy"] == "hidrop-64")
    assert f"Gain in CPU time over that with 1 client(s): hidrop-64 {two / one:.2f} at 2. 2 rounds," in text
    assert text.endswith("<!-- end of tiny -->\nThe end.\n")
    assert "expected numbers from 1 to 1024" in refused("bench", "serve", "--clients", "1,many")
