"""Muon: its iteration against a decomposition and PyTorch's optimizer, what it learns, and lost steps."""

import json
from unittest.mock import patch

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from unet_diffusion import UNet
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.data.config import DataConfig
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics
from unet_diffusion.training.optimizer import KERNEL_RATE, Muon, kernels_inside, make_optimizer, orthogonal
from unet_diffusion.training.run_folder import claim


@pytest.mark.parametrize("shape", [(3, 8, 27), (3, 27, 8), (1, 5, 5)])
def test_the_iteration_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    given = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(0))
    found = orthogonal(given)
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    inner = left.mT @ found @ right.mT  # diagonal, if the vectors are the same
    diagonal = inner.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inner, torch.diag_embed(diagonal), atol=1e-9, rtol=0)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    torch.testing.assert_close(orthogonal(7 * given), found)  # whatever the scale


def spread(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.manual_seed(0)) * torch.logspace(0, -2, shape[2])


def dominated(shape: tuple[int, ...]) -> torch.Tensor:
    """One singular value is about 20 times the next, as in gradients that all images agree on."""
    left, right = (torch.randn(shape[0], side, generator=torch.manual_seed(side)) for side in shape[1:])
    return left[:, :, None] * right[:, None] + 0.05 * torch.randn(shape, generator=torch.manual_seed(0))


@pytest.mark.parametrize("make", [spread, dominated])
@pytest.mark.parametrize("shape", [(2, 128, 256), (2, 256, 128), (2, 128, 128)])
def test_products_in_bfloat16_give_the_same_within_their_rounding(shape, make):
    """As its authors compute it; the errors of 8 bits must not add up over the iterations."""
    found, expected = orthogonal(make(shape), torch.bfloat16), orthogonal(make(shape))
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.06 * expected.norm()
    assert torch.linalg.svdvals(found).max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(1, 3, 4), torch.bfloat16), torch.zeros(1, 3, 4))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_large_kernels_are_multiplied_in_the_precision_of_the_training(tmp_path, precision):
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"channels": [8, 128], "head_channels": 8}))
    training = TrainingConfig(
        steps=1, batch_size=2, warmup_steps=1, mixed_precision=precision, optimizer="muon", trackers=()
    )
    data = DataConfig(max_images=10, validation_fraction=0, image_size=8)
    with patch("unet_diffusion.training.optimizer.orthogonal", side_effect=orthogonal) as called:
        train_ddpm(TrainDDPM(tmp_path / "run", str(network), data, DiffusionConfig(preview_images=1), training))
    used = {min(call.args[0].shape[1:]) >= 128: call.args[1] for call in called.call_args_list}
    assert used == {False: None, True: torch.bfloat16 if precision == "bf16" else torch.float32}


def test_no_gradient_gives_no_update():
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def pytorch_muon():
    return getattr(torch.optim, "Muon", None)  # from 2.9 on


@pytest.mark.skipif(pytorch_muon() is None, reason="this PyTorch has no Muon")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_matrices_are_learnt_as_by_pytorch(shape):
    """Which computes in bfloat16, of 8 bits: an update of 0.02 differs by a few percent."""
    start = torch.randn(shape, generator=torch.manual_seed(0))
    gradients = torch.randn(3, *shape, generator=torch.manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = (
        Muon([{"params": [ours], "kernels": True}], lr=0.02, weight_decay=0.1, fused=True),
        pytorch_muon()([theirs], lr=0.02, weight_decay=0.1),
    )
    for gradient in gradients:
        for parameter, optimizer in zip((ours, theirs), optimizers):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.05 * expected.norm()


def test_a_convolution_is_learnt_as_the_matrix_of_its_outputs():
    kernel = torch.randn(8, 3, 3, 3, generator=torch.manual_seed(0))
    gradient = torch.randn(8, 3, 3, 3, generator=torch.manual_seed(1))
    as_kernel, as_matrix = nn.Parameter(kernel.clone()), nn.Parameter(kernel.flatten(1).clone())
    for parameter in (as_kernel, as_matrix):
        parameter.grad = gradient.view_as(parameter).clone()
        Muon([{"params": [parameter], "kernels": True}], lr=0.02, weight_decay=0.0).step()
    torch.testing.assert_close(as_kernel.flatten(1), as_matrix)


def test_stems_heads_embeddings_norms_and_biases_are_left_to_adamw():
    unet = UNet.from_preset("tiny", num_class_embeds=3).to_segmentation(2)
    inside = set(kernels_inside(unet))
    names = {name for name, parameter in unet.named_parameters() if parameter not in inside and parameter.ndim > 1}
    assert names == {
        *("stem.weight", "noise_head.weight", "segmentation_head.weight"),
        *("time_embed.linear_1.weight", "time_embed.linear_2.weight", "time_embed.classes.weight"),
    }
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    stock = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **blocks)
    taken = {parameter for parameter in stock.parameters() if parameter.ndim > 1} - set(kernels_inside(stock))
    assert {name.split(".")[0] for name, each in stock.named_parameters() if each in taken} == {
        *("conv_in", "conv_out", "time_embedding"),
    }


def test_groups_keep_their_share_of_the_learning_rate():
    unet = UNet.from_preset("tiny").to_segmentation(2)
    head = set(unet.segmentation_head.parameters())
    trunk = [each for each in unet.parameters() if each not in head]
    optimizer = make_optimizer("muon", unet, [(trunk, 0.1), (list(head), 1.0)], 1e-3, 0.0)
    found = [(group["share"], "kernels" in group, len(group["params"])) for group in optimizer.param_groups]
    kernels = len(kernels_inside(unet))
    assert found == [(0.1, False, len(trunk) - kernels), (0.1 * KERNEL_RATE, True, kernels), (1.0, False, len(head))]
    with pytest.raises(ValueError, match="optimizer is 'muon', but no kernel inside the U learns"):
        make_optimizer("muon", unet, [(list(head), 1.0)], 1e-3, 0.0)


def test_a_lost_step_changes_neither_a_kernel_nor_its_momentum():
    kernel, bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))
    groups = [{"params": [bias]}, {"params": [kernel], "kernels": True}]
    optimizer = Muon(groups, lr=0.02, weight_decay=0.1, fused=True)
    kernel.grad, bias.grad = torch.randn_like(kernel), torch.randn_like(bias)
    optimizer.step()
    before = [kernel.clone(), bias.clone(), optimizer.state[kernel]["momentum"].clone()]
    kernel.grad, bias.grad = torch.full_like(kernel, torch.nan), torch.full_like(bias, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, before, [kernel, bias, optimizer.state[kernel]["momentum"]]))
    assert len(optimizer.param_groups) == 2
    optimizer.found_inf = torch.zeros(())
    kernel.grad, bias.grad = torch.ones_like(kernel), torch.ones_like(bias)
    optimizer.step()
    assert not torch.equal(before[0], kernel) and kernel.isfinite().all() and bias.isfinite().all()


@pytest.mark.parametrize(("recipe", "given", "used"), [(None, "auto", "muon"), ("ddpm", "auto", "adamw")])
def test_the_recipe_says_which_optimizer_a_run_gets(tmp_path, recipe, given, used):
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    training = TrainingConfig(steps=2, batch_size=4, warmup_steps=1, optimizer=given, log_every=1, trackers=())
    data = DataConfig(max_images=40, validation_fraction=0.1, image_size=8)
    options = TrainDDPM(tmp_path / "run", str(network), data, DiffusionConfig(recipe, preview_images=1), training)
    run = train_ddpm(options)
    assert json.loads((run / "config.json").read_text())["optimizer"] == used
    rates = [row["learning_rate"] for row in read_metrics(run / "metrics.jsonl") if "learning_rate" in row]
    assert rates == pytest.approx([1e-3, 0.0])  # of AdamW; that of Muon follows it
    training.optimizer = {"muon": "adamw", "adamw": "muon"}[used]
    with pytest.raises(ValueError, match=f"optimizer is '{training.optimizer}', but the run in .* with '{used}'"):
        train_ddpm(options)


def test_runs_from_before_there_was_a_choice_had_adamw(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="optimizer is 'muon', but the run in .* was started with 'adamw'"):
        claim(tmp_path, {"optimizer": "muon"})
    claim(tmp_path, {"optimizer": "adamw"})


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer is 'sgd', but must be one of 'auto', 'adamw', 'muon'"):
        TrainingConfig(optimizer="sgd")
