"""The benchmark's arithmetic, its contenders, and each measurement at a size that takes no time."""

import json
import time
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from matplotlib.figure import Figure
from PIL import Image

from scripts.benchmarks import growth, inference, segmenters, speed, timing, training_step
from scripts.benchmarks.compared_networks import OURS, Contender, stock
from scripts.benchmarks.processes import resident
from unet_diffusion import UNet


def test_work_is_taken_in_turn_and_the_warm_up_left_out():
    turns = []
    seconds = timing.alternate({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=3, warm_up=1)
    assert "".join(turns) == "abababab"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_the_rounds():
    value = timing.ratio([2.0, 9.0, 4.0, 10.0, 3.0], [1.0, 3.0, 1.0, 2.0, 3.0])  # 2, 3, 4, 5, 1
    assert (value.median, value.low, value.high) == (3, 2, 4)
    assert str(value) == "3.00 (2.00 to 4.00)"


def test_precisions_are_compared_with_their_own_and_as_they_come():
    seconds = {("ours", "no"): [2.0] * 3, ("ours", "bf16"): [1.0] * 3, ("peer", "no"): [6.0] * 3}
    seconds["peer", "bf16"] = [5.0] * 3
    found = timing.ratios(seconds, "ours", "peer")
    assert {column: each.median for column, each in found.items()} == dict(zip(timing.COLUMNS, (3.0, 5.0, 6.0)))
    assert list(timing.ratios(seconds, "ours", "peer", peer_comes_in=None)) == ["float32", "bfloat16"]
    assert timing.by_name({("ours", "bf16"): 1}) == {"ours, bfloat16": 1}


def test_without_bfloat16_ours_comes_in_float32(monkeypatch):
    monkeypatch.setattr(timing, "has_bfloat16", lambda device: False)
    assert timing.timed_precisions(torch.device("cpu")) == ("no",)
    found = timing.ratios({("ours", "no"): [2.0] * 3, ("peer", "no"): [6.0] * 3}, "ours", "peer")
    assert {column: each.median for column, each in found.items()} == {"float32": 3, "as they come": 3}


def test_a_contender_computes_in_its_precision_and_predicts_in_float32():
    convolution = torch.nn.Conv2d(3, 3, 1)
    computed = []
    convolution.register_forward_hook(lambda module, given, found: computed.append(found.dtype))
    contender = Contender(convolution, lambda noisy, timesteps: convolution(noisy))
    for precision in ("no", "bf16"):
        predicted = contender.at(precision).predict(torch.zeros(1, 3, 2, 2), torch.tensor([5]))
        assert predicted.dtype == torch.float32
    assert computed == [torch.float32, torch.bfloat16]


def test_one_thread_is_timed_by_its_own_cpu_time(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (waited,) = timing.alternate({"a": lambda: time.sleep(0.05)}, 1, 0, timing.compute_clock)["a"]
    assert waited < 0.04
    assert timing.alternate({"a": lambda: time.sleep(0.05)}, 1, 0)["a"][0] >= 0.05


def test_the_exponent_of_a_power_law_is_found():
    assert growth.exponent({x: 5 * x**1.7 for x in (2, 3, 8, 50)}) == pytest.approx(1.7)


def test_growth_is_the_median_of_the_exponents_of_the_rounds():
    row = growth.power("batch", {2: [3.0, 5.0, 1.0], 4: [6.0, 20.0, 1.0]})  # powers 1, 2, 0
    assert (row.work, row.figure) == ("step time against batch", "power 1.00 (0.50 to 1.50)")
    assert (row.value, row.quartiles) == (pytest.approx(1), pytest.approx((0.5, 1.5)))
    assert not row.target and row.met is None
    assert row.details["seconds"] == {2: 3.0, 4: 6.0}


def test_twice_the_width_has_four_times_the_weights_and_as_many_heads():
    with torch.device("meta"):
        narrow, wide = (growth.widened(width) for width in (1.0, 2.0))
    assert wide.channels_out == 2 * narrow.channels_out
    counts = [sum(p.numel() for p in network.parameters()) for network in (narrow, wide)]
    assert counts[1] / counts[0] == pytest.approx(4, rel=0.01)  # biases and normalisations grow with the width alone
    attentions = [
        [module.heads for module in network.modules() if hasattr(module, "to_q")] for network in (narrow, wide)
    ]
    assert attentions[0] == attentions[1] and attentions[0]


@pytest.mark.slow
def test_processes_share_the_images_of_a_step():
    for processes in (1, 2):
        seconds = growth.launched(processes, rounds=3)
        assert len(seconds) == 3 and min(seconds) > 0
    with pytest.raises(RuntimeError, match="growth failed: "):
        growth.launched(1, rounds="many")


def test_contenders_have_equal_parameters_within_5_percent_and_predict_an_image():
    contenders, missing = training_step.present(lambda name: speed.nine_million(name, 32), speed.CONTENDERS)
    assert set(contenders) | set(missing) == set(speed.CONTENDERS)
    assert {"unet-diffusion", "diffusers UNet2DModel"} <= set(contenders)
    stock = contenders["diffusers UNet2DModel"].parameters
    for contender in contenders.values():
        assert contender.parameters == pytest.approx(stock, rel=0.05)
        with torch.no_grad():
            assert contender.predict(torch.zeros(1, 3, 32, 32), torch.tensor([5])).shape == (1, 3, 32, 32)


def tiny(name: str):
    if name == OURS:
        return stock(UNet(channels=(8, 16), head_channels=8, attention=(False, False)))
    if name == "broken":
        raise ImportError("no operators")
    return stock(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
    )


def test_steps_are_compared_and_what_does_not_load_is_named():
    targets = {"peer": {"float32": 1e-9}, "broken": {}}
    rows = list(training_step.speed("T1", "a step", tiny, 8, 2, 3, targets, muon=True))
    faster, missing, muon, cost = rows
    assert not faster.missed("float32") and 0 < faster.ratios["float32"].low <= faster.ratios["float32"].high
    assert {"unet-diffusion, float32", "peer, float32", "unet-diffusion, Muon, float32"} <= set(
        faster.details["seconds"]
    )
    assert missing.figure == "not run: ImportError: no operators" and not missing.ratios
    assert [row.against for row in (muon, cost)] == ["peer", "ours with AdamW"]
    assert "as they come" in muon.ratios and "as they come" not in cost.ratios


def test_the_share_is_that_of_the_faster_product(monkeypatch):
    def alternate(works, rounds, warm_up, clock):
        return {key: [1.0] * rounds for key in works}  # so that the products have 17 and 19 GFLOP/s

    monkeypatch.setattr(training_step, "alternate", alternate)
    monkeypatch.setattr(training_step, "STOCK", "peer")
    ours, peer = training_step.share(tiny, 8, 2, 3)
    flops = ours.details["flops"]
    assert flops["matrix product"] == 2 * 2048**3
    assert flops["convolution"] == 64 * 2 * 9 * 256 * 256 * 16 * 16
    first = 2 * 2 * (3 * 9 * 8) * 8 * 8  # FLOPs of the first convolution on two images, forward
    assert flops[OURS] > 2 * first  # and again for its weights
    assert ours.value == pytest.approx(flops[OURS] / flops["convolution"])
    assert ours.figure.startswith("float32 0.00 (0.00 to 0.00)")
    assert (ours.met, peer.met) == (False, None)  # only ours has a target


@pytest.mark.parametrize(("precision", "optimizer"), [("no", "adamw"), ("bf16", "muon")])
def test_a_step_learns_and_moves_the_average(precision, optimizer):
    step = training_step.TrainingStep(tiny("unet-diffusion"), 8, 2, precision, optimizer)
    before = [parameter.detach().clone() for parameter in step.network.parameters()]
    for _ in range(3):
        step()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.network.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(before, step.ema.shadow_params))


@pytest.mark.slow
def test_segmentation_networks_have_equal_parameters_learn_and_segment():
    image = np.random.default_rng(0).integers(0, 256, (304, 288), dtype=np.uint8)
    names = (segmenters.OURS, segmenters.LEAN, *segmenters.PEERS)
    networks, missing = training_step.present(segmenters.segmenter, names)
    assert set(networks) | set(missing) == set(names)
    assert {segmenters.OURS, segmenters.LAYOUT} <= set(networks)
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    for name in set(networks) - {segmenters.SMP}:
        assert parameters[name] == pytest.approx(parameters[segmenters.OURS], rel=0.05)
    for name, network in networks.items():
        for precision in ("no", "bf16"):
            inference.SegmentationStep(network, 32, 1, precision)()
            result = inference.large_image(name, network, image, precision)()
            mask = result if isinstance(result, torch.Tensor) else result.masks
            assert np.asarray(mask).shape == (1, 304, 288)


def test_fused_projections_predict_the_same():
    for name in ("unet-diffusion", "diffusers UNet2DModel"):
        contender = speed.nine_million(name, 32)
        contender.network.eval()
        for parameter in contender.network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        noisy = torch.randn(1, 3, 16, 16)
        with torch.no_grad():
            before = contender.predict(noisy, torch.tensor([5]))
            inference.fuse(contender.network)
            after = contender.predict(noisy, torch.tensor([5]))
        assert not torch.equal(before, torch.zeros_like(before))
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_memory_is_that_of_the_process():
    before = resident("VmRSS")
    held = np.ones(100 * 2**20, dtype=np.uint8)
    assert 90 < resident("VmRSS") - before < 130
    assert resident("VmHWM") >= resident("VmRSS")
    del held


def test_results_are_written_row_by_row(tmp_path, monkeypatch):
    def measure():
        yield speed.Row("X1", "a | b", "peer", "2.0 times", 2.0, "1x", True)
        yield speed.Row("X1", "c", "peer", "0.5 times", 0.5, "1x", False)
        found = {"float32": timing.Ratio(1.5, 1.4, 1.6), "as they come": timing.Ratio(3.0, 2.0, 4.0)}
        yield speed.Comparison("X1", "d", "peer", found, {"float32": 2.0, "as they come": 3.0})
        yield speed.Comparison("X1", "e", "other", missing="not run: no operators")

    monkeypatch.setattr(speed, "benchmarks", lambda config: {"X1": measure, "X2": None})
    speed.run(speed.Benchmark(tmp_path, only=("X1",)))
    assert (tmp_path / "benchmark.md").read_text().splitlines() == [
        "| id | work | against | float32 | bfloat16 | as they come | target |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| X1 | d | peer | **1.50 (1.40 to 1.60)** | not run | 3.00 (2.00 to 4.00) | float32 2, as they come 3 |",
        "| X1 | e | other | not run | not run | not run |  |",
        "",
        "| id | work | against | figure | target | met |",
        "| --- | --- | --- | --- | --- | --- |",
        "| X1 | a \\| b | peer | 2.0 times | 1x | yes |",
        "| X1 | c | peer | 0.5 times | 1x | **no** |",
    ]
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["value"] for row in written["rows"][:2]] == [2.0, 0.5]
    assert written["rows"][2]["ratios"]["float32"] == {"median": 1.5, "low": 1.4, "high": 1.6}
    assert Image.open(tmp_path / "benchmark.png").size[0] == 1100


def test_rows_of_other_benchmarks_stay_and_those_measured_again_are_replaced(tmp_path, monkeypatch):
    values = iter((1.0, 2.0, 3.0))

    def measure(name):
        found = {"float32": timing.Ratio(next(values), 0.5, 4.0)}
        yield speed.Comparison(name, "a", "peer", found)
        yield speed.Row(name, "b", "peer", "", quartiles=(1.0, 2.0))

    monkeypatch.setattr(speed, "benchmarks", lambda config: {name: partial(measure, name) for name in ("X1", "X2")})
    speed.run(speed.Benchmark(tmp_path, only=("X1",), rounds=5))
    speed.run(speed.Benchmark(tmp_path, only=("X2",), rounds=7))
    both = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [(row["id"], row["options"]["rounds"]) for row in both] == [("X1", 5)] * 2 + [("X2", 7)] * 2
    speed.run(speed.Benchmark(tmp_path, only=("X1",), rounds=9))
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert rows[:2] == both[2:] and [row["options"]["rounds"] for row in rows[2:]] == [9, 9]
    lines = (tmp_path / "benchmark.md").read_text().splitlines()
    assert [line[:24] for line in lines[2:4]] == ["| X2 | a | peer | 2.00 (", "| X1 | a | peer | 3.00 ("]


def test_every_median_is_drawn_with_its_quartiles_and_target(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure) or path.touch())
    found = {"float32": timing.Ratio(4.0, 3.0, 5.0), "as they come": timing.Ratio(8.0, 7.0, 9.0)}
    rows = [
        speed.Row("X1", "a", "b", "", 4.0, "2.0x", True, quartiles=(3.0, 5.0)),
        speed.Comparison("X2", "c", "d", missing="not run: no operators"),
        speed.Comparison("X3", "e", "f", found, {"as they come": 6.0}),
    ]
    speed.save_ratios(rows[:2], tmp_path / "ratios.png")
    assert not figures  # nothing was measured
    speed.save_ratios(rows, tmp_path / "ratios.png")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["X3  e | f"]
    drawn = [list(line.get_xdata()) for line in axes.lines]
    assert drawn == [[4.0], [3.0, 5.0], [], [8.0], [7.0, 9.0], [1, 1]]
    assert [float(marks.get_segments()[0][0, 0]) for marks in axes.collections] == [6.0]


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only is 'T9', but must be among T1, T2"):
        speed.Benchmark(tmp_path, only=("T9",))
    with pytest.raises(ValueError, match="rounds is 2, but must be at least 3"):
        speed.Benchmark(tmp_path, rounds=2)
