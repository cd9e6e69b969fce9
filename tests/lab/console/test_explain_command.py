"""`dropflow explain`."""

from __future__ import annotations

import json

import pytest


def test_json_of_hidrop_64(cli) -> None:
    result = cli("explain", "hidrop-64", "--json")
    explained = json.loads(result.stdout)
    assert result.stderr == ""
    assert set(explained) == {
        "policy", "layers", "average_visual_tokens", "entry_visual_tokens", "tower_visual_tokens", "flops",
        "flops_dense", "ranked_by", "overlap", "budget", "solved", "unit",
    }  # fmt: skip
    assert explained["policy"] == "hidrop-64"
    assert explained["average_visual_tokens"] == 64.0
    assert (explained["entry_visual_tokens"], explained["tower_visual_tokens"]) == (576, 576)
    assert explained["flops"] == pytest.approx(0.42141696e12, rel=1e-4)
    assert explained["flops_dense"] == pytest.approx(3.8172e12, rel=1e-4)
    assert len(explained["layers"]) == 32
    assert explained["layers"][14] == {
        "layer": 14,
        "visual_tokens": 10,
        "kv_entries": 74,
        "flops": 10 * (4 * 4096**2 + 2 * 10 * 4096 + 3 * 4096 * 11008),
    }


def test_table_shows_layers_totals_and_what_flops_are(cli) -> None:
    shown = " ".join(cli("explain", "hidrop-64").stdout.split())
    assert "│ 10 │ 215 │ 279 │ 43.89 G │" in shown
    assert "64.00 on average over 32 layers, 576 at entry" in shown
    assert "421.4 G of 3.817 T (89.0% fewer)" in shown
    assert "multiply-adds of the visual tokens alone" in shown
    assert "(d = 4096, m = 11008)" in shown


def test_what_overlap_could_run_side_by_side(cli) -> None:
    d, m, n = 4096, 11008, 64
    text = 8 * (n * (4 * d**2 + 3 * d * m) + 2 * n**2 * d)
    tower = 24 * (4 * 577 * 1024**2 + 2 * 577**2 * 1024 + 2 * 577 * 1024 * 4096)  # CLIP-L/14 on 336 pixels
    explained = json.loads(cli("explain", "hidrop-64", "--json").stdout)
    assert explained["overlap"] == {"layers": 8, "text_tokens": 64, "text_flops": text, "vision_flops": tower}
    shown = " ".join(cli("explain", "hidrop-64").stdout.split())
    assert "layers 0 to 7 on 64 text tokens, 103.9 G, can run beside the encoder's 190.6 G" in shown
    assert "at most 103.9 G are hidden" in shown
    assert "at most 190.6 G are hidden" in " ".join(cli("explain", "hidrop-64", "--text-tokens", 512).stdout.split())


def test_without_late_injection_nothing_overlaps(cli, tmp_path) -> None:
    policy = tmp_path / "half.yaml"
    policy.write_text("stages: {exit: {use: hidrop/early-exit, at: 0.5}}\n")
    overlap = json.loads(cli("explain", policy, "--json").stdout)["overlap"]
    assert (overlap["layers"], overlap["text_flops"]) == (0, 0)
    shown = " ".join(cli("explain", policy).stdout.split())
    assert "nothing can run beside the encoder, since vision takes part from the first layer on" in shown


def test_overrides_and_text_tokens(cli) -> None:
    result = cli("explain", "hidrop-64", "--set", "stages.pyramid.keep.10=343", "--text-tokens", 0, "--json")
    explained = json.loads(result.stdout)
    assert explained["average_visual_tokens"] == 80.0
    assert explained["layers"][10]["kv_entries"] == 343


def test_rescaled_to_another_shape(cli) -> None:
    shape = ("--layers", 16, "--visual-tokens", 144)
    explained = json.loads(cli("explain", "hidrop-64", *shape, "--set", "rescale=true", "--json").stdout)
    counts = [layer["visual_tokens"] for layer in explained["layers"]]
    assert counts == [0] * 4 + [144] + [54] * 2 + [3] + [1] * 4 + [0] * 4


def test_numbers_solved_from_a_budget(cli, tmp_path) -> None:
    policy = tmp_path / "solved.yaml"
    keep = "{10: solve, 14: 10, 16: 5, 18: 1}"
    policy.write_text(
        f"budget: {{average_tokens: 76}}\nstages:\n  pyramid: {{use: hidrop/concave-pyramid, keep: {keep}}}\n"
        "  inject: {use: hidrop/late-injection, at: 8}\n"
    )
    explained = json.loads(cli("explain", policy, "--set", "budget.average_tokens=64", "--json").stdout)
    assert (explained["budget"], explained["solved"]) == ({"average_tokens": 64}, {"stages.pyramid.keep.10": 213})
    assert explained["average_visual_tokens"] == 64
    shown = " ".join(cli("explain", policy).stdout.split())
    assert "stages.pyramid.keep.10: 309, solved for average_tokens 76" in shown


def test_a_policy_tuned_for_nothing_gets_32_layers_and_576_tokens(cli, tmp_path) -> None:
    policy = tmp_path / "half.yaml"
    policy.write_text("stages: {exit: {use: hidrop/early-exit, at: 0.5}}\n")
    explained = json.loads(cli("explain", policy, "--json").stdout)
    assert explained["policy"] == "half"
    assert [layer["visual_tokens"] for layer in explained["layers"]] == [576] * 16 + [0] * 16
    assert cli("explain", policy).exit_code == 0


def test_widths_and_depth_of_a_model_folder(cli, model_folder, mild) -> None:
    explained = json.loads(cli("explain", mild, "--config", model_folder, "--json").stdout)
    assert [layer["visual_tokens"] for layer in explained["layers"]] == [144, 144, 40, 0]
    assert explained["layers"][2]["flops"] == 40 * (4 * 128**2 + 2 * 40 * 128 + 3 * 128 * 352)
    vision = json.loads((model_folder / "config.json").read_text())["vision_config"]
    d, m, n = vision["hidden_size"], vision["intermediate_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    layer = 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m
    assert explained["overlap"]["vision_flops"] == vision["num_hidden_layers"] * layer > 0


def test_absolute_numbers_do_not_fit_another_depth(refused, model_folder) -> None:
    assert "stages.inject.at" in refused("explain", "hidrop-64", "--config", model_folder)


def test_a_folder_without_config(refused, tmp_path) -> None:
    assert str(tmp_path) in refused("explain", "hidrop-64", "--config", tmp_path)


def test_a_config_that_transformers_cannot_read(refused, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    assert "no-such-family" in refused("explain", "hidrop-64", "--config", tmp_path)


def test_what_the_data_decides_is_shown_as_such() -> None:
    from rich.console import Console

    from dropflow.backbone.flops import LLAVA_7B
    from dropflow_lab.console.commands.explain import _summary, _table
    from dropflow_lab.explain.beside import Beside
    from dropflow_lab.explain.forecast import Explanation, LayerForecast

    layers = (LayerForecast(0, 100, 110, 5e9), LayerForecast(1, None, None, None))
    explanation = Explanation("adaptive", layers, None, 100, 100, None, 1e10, {}, Beside(None, 64, None, 2e11))
    console = Console(width=100)
    with console.capture() as captured:
        console.print(_table(explanation), _summary(explanation, LLAVA_7B))
    shown = " ".join(captured.get().split())
    assert "│ 1 │ data │ data │ data │" in shown
    assert "data on average over 2 layers, 100 at entry" in shown
    assert "FLOPs: data of 10 G" in shown
    assert "overlap: the data decide before which layer vision enters" in shown
