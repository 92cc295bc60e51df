import torch

from unet_diffusion.randomness import keyed_generator, seeded_normal, standard_normal

CPU = torch.device("cpu")  # it stands for an accelerator


def generators(*indices: int) -> list[torch.Generator]:
    return [keyed_generator(0, "sample", index) for index in indices]


def test_noise_on_a_cpu_comes_from_the_generators_themselves():
    expected = torch.stack([torch.randn(2, 3, generator=generator) for generator in generators(0, 1)])
    assert torch.equal(standard_normal((2, 3), generators(0, 1), CPU), expected)


def test_noise_drawn_on_a_device_depends_on_the_generator_of_its_sample_alone():
    batch = seeded_normal((1, 8, 8), generators(0, 1, 2), CPU)
    assert torch.equal(seeded_normal((1, 8, 8), generators(2, 0), CPU), batch[[2, 0]])
    assert len({tuple(sample.flatten().tolist()) for sample in batch}) == 3


def test_noise_drawn_on_a_device_differs_from_draw_to_draw():
    again = generators(0)
    assert not torch.equal(seeded_normal((4,), again, CPU), seeded_normal((4,), again, CPU))


def test_noise_drawn_on_a_device_is_standard_normal():
    values = seeded_normal((10_000,), generators(*range(10)), CPU)
    assert values.mean().abs() < 4 / 100_000**0.5  # 4 standard errors
    assert (values.square().mean() - 1).abs() < 4 * (2 / 100_000) ** 0.5
