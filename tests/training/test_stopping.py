import subprocess
import sys

import torch
from torch import nn

from unet_diffusion.training.stopping import BestWeights


def network(value: float) -> nn.Module:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_the_highest_score_wins_and_nan_never_does():
    best = BestWeights()
    for step, score in enumerate([0.2, float("nan"), 0.7, 0.5], start=1):
        best.offer(score, step, network(step))
    loaded = network(0)
    best.load_into(loaded)
    assert (best.score, best.step, best.misses, loaded.weight.item()) == (0.7, 3, 1, 3)


def test_without_any_score_a_network_keeps_its_weights():
    best, kept = BestWeights(), network(5)
    best.offer(float("nan"), 1, network(1))
    best.load_into(kept)
    assert kept.weight.item() == 5


def test_the_kept_weights_do_not_follow_the_network():
    best, learning = BestWeights(), network(1)
    best.offer(0.5, 1, learning)
    nn.init.constant_(learning.weight, 9)
    assert best.tensors["weight"].item() == 1


def test_patience_runs_out_after_two_validations_without_a_higher_score():
    best = BestWeights(patience=2)
    for score, exhausted in [(0.5, False), (0.5, False), (0.6, False), (0.4, False), (0.6, True)]:
        best.offer(score, 1, network(1))
        assert best.exhausted is exhausted
    assert not BestWeights().exhausted


def test_restored_state_continues_exactly():
    best = BestWeights(patience=2)
    best.offer(0.5, 10, network(3))
    best.offer(0.4, 20, network(4))
    again = BestWeights(patience=2)
    again.restore(best.state(), best.tensors)
    again.offer(0.45, 30, network(5))
    loaded = network(0)
    again.load_into(loaded)
    assert again.exhausted and loaded.weight.item() == 3
    assert torch.equal(again.tensors["weight"], best.tensors["weight"])


def test_data_workers_outlive_what_ends_the_run():
    """As Ctrl-C and SIGTERM reach all processes of a terminal or a job."""
    code = """
import os, signal
from unet_diffusion.training.stopping import outlive_signals
outlive_signals(0)
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGTERM)
print("alive", signal.alarm(0) > 0)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "alive True\n"
