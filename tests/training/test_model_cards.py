import math

from unet_diffusion.training.model_cards import Card

CONFIG = {"training": {"batch_size": 4, "accumulate": 1}, "data": {"data": "images"}}


def card(*scores: float) -> str:
    rows = [{"step": step, "mean_iou": score} for step, score in enumerate(scores, start=1)]
    return Card("image-segmentation", "A network.", {}, "").text("mine", rows, CONFIG, "mean_iou", [])


def test_the_card_names_the_step_whose_weights_are_kept():
    """As `BestWeights` chooses them: the highest score, the first of equal ones, and never NaN."""
    assert "Mean IoU: 0.50000 on held-out images, at step 2, the step of these weights" in card(math.nan, 0.5, 0.5, 0.1)
    assert "Mean IoU: undefined on held-out images; these are the last weights" in card(math.nan)
