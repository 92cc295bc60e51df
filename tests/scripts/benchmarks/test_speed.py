"""The benchmark's arithmetic, its contenders, and each measurement at a size that takes no time."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from matplotlib.figure import Figure
from PIL import Image

from scripts.benchmarks import growth, inference, segmenters, speed, timing, training_step
from scripts.benchmarks.compared_networks import OURS, stock
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


def test_the_exponent_of_a_power_law_is_found():
    assert growth.exponent({x: 5 * x**1.7 for x in (2, 3, 8, 50)}) == pytest.approx(1.7)


def test_growth_is_the_median_of_the_exponents_of_the_rounds():
    row = growth.power("batch", {2: [3.0, 5.0, 1.0], 4: [6.0, 20.0, 1.0]})  # powers 1, 2, 0
    assert (row.work, row.figure) == ("step time against batch", "power 1.00 (0.50 to 1.50)")
    assert (row.value, row.quartiles) == (pytest.approx(1), pytest.approx((0.5, 1.5)))
    assert row.aim is None and row.met is None
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
    rows = list(training_step.speed("T1", "a step", tiny, 8, 2, 3, {"peer": 1e-9, "broken": 1.5}))
    faster, missing, *shares = rows
    low, high = faster.quartiles
    assert faster.met and 0 < low <= faster.value <= high
    assert faster.details["seconds"].keys() == {"unet-diffusion", "peer", "matrix product", "convolution"}
    assert faster.details["flops"]["matrix product"] == 2 * 2048**3
    assert faster.details["flops"]["convolution"] == 64 * 2 * 9 * 256 * 256 * 16 * 16
    assert missing.figure == "not run: ImportError: no operators" and missing.met is None
    assert [row.against for row in shares] == ["unet-diffusion", "peer"]
    first = 2 * 2 * (3 * 9 * 8) * 8 * 8  # FLOPs of the first convolution on two images, forward
    assert shares[0].details["flops"]["unet-diffusion"] > 2 * first  # and again for its weights


def test_a_step_learns_and_moves_the_average():
    step = training_step.TrainingStep(tiny("unet-diffusion"), 8, 2)
    before = [parameter.detach().clone() for parameter in step.network.parameters()]
    for _ in range(3):
        step()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.network.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(before, step.ema.shadow_params))


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
        inference.SegmentationStep(network, 32, 1)()
        result = inference.large_image(name, network, image)()
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

    monkeypatch.setattr(speed, "benchmarks", lambda config: {"X1": measure, "X2": None})
    speed.run(speed.Benchmark(tmp_path, only=("X1",)))
    assert (tmp_path / "benchmark.md").read_text().splitlines()[2:] == [
        "| X1 | a \\| b | peer | 2.0 times | 1x | yes |",
        "| X1 | c | peer | 0.5 times | 1x | **no** |",
    ]
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["value"] for row in written["rows"]] == [2.0, 0.5]
    assert Image.open(tmp_path / "benchmark.png").size[0] == 1100


def test_targets_are_numbers_of_the_scale_of_their_values():
    rows = [speed.Row("X1", "a", "b", "c", target=target) for target in ("2.0x", "0.25x", "75%", "")]
    assert [row.aim for row in rows] == [2.0, 0.25, 0.75, None]


def test_a_bar_is_drawn_for_every_row_with_a_number_and_a_target(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure) or path.touch())
    rows = [
        speed.Row("X1", "a", "b", "", 4.0, "2.0x", True, quartiles=(3.0, 5.0)),
        speed.Row("X2", "c", "d", "not run: no operators", target="2.0x"),
        speed.Row("X3", "e", "f", "", 0.5, "0.25x", False),
        speed.Row("X4", "g", "h", "power 1", 1.0),
    ]
    speed.save_bars(rows, tmp_path / "bars.png")
    (axes,) = figures[0].axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(1, 3.0), (1, -0.5)]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "X1  a | b | 4.00 (2.0x)",
        "X3  e | f | 0.50 (0.25x)",
    ]
    targets = [float(marks.get_segments()[0][0, 0]) for marks in axes.collections]
    assert targets == [2.0, 0.25]
    quartiles = [list(line.get_xdata()) for line in axes.lines]
    assert [3.0, 5.0] in quartiles and len(quartiles) == 2  # and the line at 1


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only is 'T9', but must be among T1, T2"):
        speed.Benchmark(tmp_path, only=("T9",))
    with pytest.raises(ValueError, match="rounds is 2, but must be at least 3"):
        speed.Benchmark(tmp_path, rounds=2)
