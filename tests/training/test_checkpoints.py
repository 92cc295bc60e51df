import copy
import json
import logging
import pickle

import pytest
import torch
from safetensors.torch import save_file

from unet_diffusion.training import checkpoints
from unet_diffusion.training.checkpoints import (
    FORMAT,
    Checkpoint,
    DamagedCheckpoint,
    load_checkpoint,
    load_latest,
    optimizer_tensors,
    restore_optimizer,
    same_bits,
    save_checkpoint,
    saved_checkpoints,
    weights_digest,
)


def checkpoint(step: int) -> Checkpoint:
    tensors = {"model": {"weight": torch.full((3, 2), float(step))}, "ema": {"weight": torch.randn(2)}}
    return Checkpoint(step=step, tensors=tensors, state={"loss_sum": 0.1, "scaler": None})


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    saved = checkpoint(7)
    save_checkpoint(tmp_path, saved, keep=2)
    loaded = load_latest(tmp_path)
    assert loaded.step == 7 and loaded.state["loss_sum"] == 0.1
    for part, tensors in saved.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(loaded.tensors[part][name], value)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 9, 10):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert sorted(tmp_path.iterdir()) == saved_checkpoints(tmp_path)
    assert [path.name for path in saved_checkpoints(tmp_path)] == ["step-00000009", "step-00000010"]


def test_copies_of_a_user_are_no_checkpoints_and_stay(tmp_path):
    kept = [tmp_path / name for name in ("step-00000002-keep", "step-00000009.old", "step-1")]
    for folder in kept:
        folder.mkdir()
    (tmp_path / "step-00000011").write_text("a file")
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, checkpoint(step), keep=1)
    assert saved_checkpoints(tmp_path) == [tmp_path / "step-00000003"]
    assert all(folder.is_dir() for folder in kept)


def test_a_digest_changes_with_any_weight():
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    before = weights_digest(network)
    assert before == weights_digest(copy.deepcopy(network).to(memory_format=torch.contiguous_format))
    with torch.no_grad():
        network.bias[1] += 1e-6
    assert weights_digest(network) != before


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "empty_json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, harm, caplog):
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    path = save_checkpoint(tmp_path, checkpoint(2), keep=2)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "truncate":
        file.write_bytes(data[:-5])
    elif harm == "remove":
        file.unlink()
    else:
        (path / "checksums.json").write_text("")
    with caplog.at_level(logging.WARNING):
        assert load_latest(tmp_path).step == 1
    assert "step-00000002 is damaged" in caplog.text


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_of_later_steps_do_not_crowd_out_a_new_one(tmp_path, keep):
    """A run that went back to step 1 saves at step 3: the damaged ones must not count as the newest."""
    for step in (1, 4, 6):
        path = save_checkpoint(tmp_path, checkpoint(step), keep=3)
        if step > 1:
            (path / "model.safetensors").unlink()
    assert load_latest(tmp_path).step == 1
    save_checkpoint(tmp_path, checkpoint(3), keep=keep)
    assert load_latest(tmp_path).step == 3
    assert [path.name for path in tmp_path.iterdir() if path.name > "step-00000003"] == []


def test_a_part_that_is_missing_together_with_its_checksum_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    (path / "ema.safetensors").unlink()
    checksums = json.loads((path / "checksums.json").read_text())
    del checksums["ema.safetensors"]
    (path / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(DamagedCheckpoint, match="ema.safetensors"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["[]", "null", "{}", "\xff"])
def test_invalid_checksums_count_as_damage(tmp_path, text):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    (path / "checksums.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamagedCheckpoint, match="step-00000001 is damaged"):
        load_checkpoint(path)


def test_a_checkpoint_that_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    """Its checksums match its files, so they alone would not show it."""
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    monkeypatch.setattr(checkpoints, "save_file", lambda tensors, path: save_file({"weight": torch.ones(3, 2)}, path))
    with pytest.raises(OSError, match="the checkpoint of step 2 could not be saved: .* reads back differently"):
        save_checkpoint(tmp_path, checkpoint(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_lost_numbers_and_scalars_are_compared_by_their_bits():
    some = {"a": {"x": torch.tensor([float("nan")]), "y": torch.tensor(3), "z": torch.zeros(2, 0)}}
    assert same_bits(some, {"a": {name: value.clone() for name, value in some["a"].items()}})
    assert not same_bits(some, {"a": some["a"] | {"y": torch.tensor(3.0)}})
    assert not same_bits(some, {"a": some["a"] | {"y": torch.tensor(4)}})
    assert not same_bits({"a": {"x": torch.tensor(0.0)}}, {"a": {"x": torch.tensor(-0.0)}})
    assert not same_bits(some, {"a": {"x": some["a"]["x"]}})


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=2)
    (path / "state.json").write_text("{}")
    with pytest.raises(DamagedCheckpoint, match="all 1 checkpoints"):
        load_latest(tmp_path)


def test_without_checkpoints_there_is_nothing_to_load(tmp_path):
    assert load_latest(tmp_path / "absent") is None


def test_a_later_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("unet_diffusion.training.checkpoints.FORMAT", FORMAT + 1)
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}, but this version reads format {FORMAT}"):
        load_latest(tmp_path)


def test_a_failed_write_leaves_earlier_checkpoints_and_nothing_else(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    broken = checkpoint(2)
    broken.tensors["optimizer"] = {"shared": torch.zeros(3).expand(2, 3), "bad/../name": torch.zeros(1)}
    (tmp_path / "blocked").write_text("")
    with pytest.raises(OSError, match="the checkpoint of step 2 could not be saved: .* earlier ones are unchanged"):
        save_checkpoint(tmp_path / "blocked", broken, keep=2)  # a file where the folder should be
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000001"]


def test_a_pickle_in_place_of_weights_is_not_executed(tmp_path):
    """The reader refuses a crafted file with correct checksums; the payload does not run."""

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    (path / "model.safetensors").write_bytes(pickle.dumps(Payload()))
    checksums = json.loads((path / "checksums.json").read_text())
    from unet_diffusion.training.checkpoints import sha256

    checksums["model.safetensors"] = sha256(path / "model.safetensors")
    (path / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(DamagedCheckpoint):
        load_latest(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_restored_optimizer_continues_bit_for_bit(fused, layout):
    def trained(steps: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(steps):
            model(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def new():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=layout)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)

    def names(model: torch.nn.Module) -> dict:
        return {parameter: name for name, parameter in model.named_parameters()}

    model, optimizer = new()
    trained(3, model, optimizer)
    saved = optimizer_tensors(optimizer, names(model))
    tensors = {key: value.contiguous().clone() for key, value in saved.items()}  # as a file gives them
    other, other_optimizer = new()
    other.load_state_dict(model.state_dict())
    restore_optimizer(other_optimizer, names(other), tensors)
    for each in ((model, optimizer), (other, other_optimizer)):
        trained(3, *each)
    assert torch.equal(model.weight, other.weight)
    with pytest.raises(ValueError, match="but the network does not"):
        restore_optimizer(other_optimizer, names(other), {"missing/exp_avg": torch.zeros(1)})
