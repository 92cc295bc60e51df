"""The reduced set of kills: what was lost, and what is left running."""

import sys

import pytest

from tests.support.scripts import SCRIPTS


@pytest.fixture(scope="module")
def kills():
    sys.path.insert(0, str(SCRIPTS))  # as when scripts/faults.py is run
    from fault_checks import kills

    yield kills
    sys.path.remove(str(SCRIPTS))


@pytest.mark.slow
def test_a_killed_run_loses_nothing_and_leaves_no_process(kills, tmp_path):
    findings = list(kills.checks(True, tmp_path))
    assert len(findings) == 4
    assert [finding for finding in findings if not finding.held] == []


def test_a_run_that_ends_otherwise_is_told_from_the_undisturbed_one(kills, tmp_path):
    """Else no kill could ever be found to have done harm."""
    from fault_checks.tiny_runs import differences, into, tiny_runs, train

    options = tiny_runs(tmp_path, steps=2)["ddpm"]
    for name in ("whole", "other"):
        train(into(options, tmp_path / name))
    assert differences(tmp_path / "other", tmp_path / "whole") == []
    (tmp_path / "other" / ".writing-1-a").write_text("")
    with (tmp_path / "other" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n')
    weights = tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    found = differences(tmp_path / "other", tmp_path / "whole")
    assert found == ["unet/diffusion_pytorch_model.safetensors", "metrics.jsonl", "leftover .writing-1-a"]


def test_a_command_is_given_all_options_of_the_run(kills, tmp_path):
    from fault_checks.tiny_runs import into, tiny_runs
    from tyro import cli
    from tyro.conf import OmitArgPrefixes

    options = into(tiny_runs(tmp_path)["ddpm"], tmp_path / "run", num_workers=1)
    name, *arguments = kills.arguments(options)
    assert (name, cli(type(options), args=arguments, config=(OmitArgPrefixes,))) == ("train-ddpm", options)
