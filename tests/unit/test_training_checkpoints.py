"""What a checkpoint is made of: plain state, pieces of tensors, checksums, and whose it is."""

from __future__ import annotations

import json
import math
import pickle
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import nn

from rlhf.config.ppo import PPOConfig
from rlhf.distributed.pieces import Piece, TrainingPieces, training_pieces
from rlhf.distributed.plain_state import copied, read_state, write_state
from rlhf.distributed.runtime import Runtime
from rlhf.distributed.training_checkpoints import (
    TrainingCheckpoints,
    check_provenance,
    find_checkpoint,
    generator_states,
    set_generator_states,
)
from rlhf.distributed.training_files import frozen_checksum, read_training, write_training
from rlhf.errors import ArtifactError
from rlhf.stages.ppo import loop
from rlhf.stages.ppo.guards import Guards
from rlhf.stages.ppo.state import TrainingState

RUNTIME = Runtime(0, 1, 0, torch.device("cpu"), "fp32")


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "number": 0.1 + 0.2,
        "nothing": None,
        "lost": math.nan,
        "far": -math.inf,
        "list": [1, (True, "text")],
        "tensors": {"a": torch.arange(3), "b": [torch.tensor(2.5, dtype=torch.bfloat16)]},
    }
    write_state(tmp_path, "state", state)
    found = read_state(tmp_path, "state")
    assert found["number"] == 0.1 + 0.2
    assert found["nothing"] is None
    assert math.isnan(found["lost"])
    assert found["far"] == -math.inf
    assert found["list"] == [1, [True, "text"]]
    assert found["tensors"]["a"].tolist() == [0, 1, 2]
    assert found["tensors"]["b"][0].dtype == torch.bfloat16
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_tensors_are_written_once_and_read_when_they_are_looked_at(tmp_path: Path) -> None:
    whole, other = torch.arange(6.0), torch.ones(3)
    write_state(tmp_path, "state", {"half": whole[:3], "turned": whole.view(2, 3).T, "twice": [other, other]})
    mapped = read_state(tmp_path, "state", mapped=True)
    assert mapped["half"].tolist() == [0, 1, 2]
    assert mapped["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert mapped["twice"][1].tolist() == [1, 1, 1]
    maps = Path("/proc/self/maps")
    assert str(tmp_path) in maps.read_text()
    kept = copied(mapped)
    mapped.clear()
    assert str(tmp_path) not in maps.read_text()
    assert kept["half"].tolist() == [0, 1, 2]


def test_what_is_not_plain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a PosixPath cannot be part of a state \(at /where\)"):
        write_state(tmp_path, "state", {"where": tmp_path})
    with pytest.raises(TypeError, match="must be text"):
        write_state(tmp_path, "state", {"by number": {1: 2}})


def test_a_pickle_in_the_place_of_a_state_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(tmp_path / "sprung"), "w")

    (tmp_path / "state.json").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_state(tmp_path, "state")
    assert not (tmp_path / "sprung").exists()


def test_generators_go_on_where_they_were() -> None:
    states = json.loads(json.dumps({name: value for name, value in _states().items() if name != "torch"}))
    before = torch.get_rng_state()
    first = torch.rand(3)
    set_generator_states({**states, "torch": before}, torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)


def _states() -> dict[str, object]:
    return generator_states(torch.device("cpu"))


class Half(nn.Module):
    """Two trained layers, one of which is never used, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.frozen(self.used(rows))
        return result


def _train(steps: int) -> tuple[Half, torch.optim.AdamW]:
    torch.manual_seed(0)
    module = Half()
    optimizer = torch.optim.AdamW([value for value in module.parameters() if value.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    return module, optimizer


def test_a_parameter_the_optimiser_never_stepped_on_stays_without_state(tmp_path: Path) -> None:
    module, optimizer = _train(2)
    list(write_training(tmp_path, training_pieces(module, optimizer), 0, with_frozen=False))
    other, fresh = _train(1)
    read_training(tmp_path, training_pieces(other, fresh), with_frozen=False)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in other.state_dict().items())
    assert set(fresh.state) == {other.used.weight, other.used.bias}
    assert float(fresh.state[other.used.weight]["step"]) == 2
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(fresh.state[other.used.weight][key], optimizer.state[module.used.weight][key])


def test_an_empty_optimiser_state_is_an_error(tmp_path: Path) -> None:
    module, optimizer = _train(0)
    list(write_training(tmp_path, training_pieces(module, optimizer), 0, with_frozen=False))
    with pytest.raises(ArtifactError, match=r"optimiser's state .* is empty"):
        read_training(tmp_path, training_pieces(*_train(1)), with_frozen=False)


def test_missing_elements_are_named(tmp_path: Path) -> None:
    list(write_training(tmp_path, training_pieces(*_train(1)), 0, with_frozen=False))
    index = json.loads((tmp_path / "pieces-00000.json").read_text())
    index["pieces"]["weights"]["used.weight"] = [0, 4]
    (tmp_path / "pieces-00000.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"lacks 2 of the 6 elements of weights of used.weight"):
        read_training(tmp_path, training_pieces(*_train(1)), with_frozen=False)


class Other(nn.Module):
    """`weight` with a shape, other parameters by name."""

    def __init__(self, shape: tuple[int, ...], more: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        for name in more:
            self.register_parameter(name, nn.Parameter(torch.ones(1)))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (Other((5, 3)), r"weight with shape \[5, 3\], and this run has it with shape \[2, 3\]"),
        (Other((3, 2)), r"weight with shape \[3, 2\], and this run has it with shape \[2, 3\]"),
        (Other((2, 3), ("more",)), r"more with shape \[1\], and this run has it with shape none"),
        (Other((2, 3)), None),
    ],
)
def test_another_model_is_refused(tmp_path: Path, saved: Other, message: str | None) -> None:
    def pieces(module: Other) -> TrainingPieces:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        torch.stack([value.sum() for value in module.parameters()]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return training_pieces(module, optimizer)

    list(write_training(tmp_path, pieces(saved), 0, with_frozen=False))
    mine = Other((2, 3))
    with nullcontext() if message is None else pytest.raises(ArtifactError, match=message):
        read_training(tmp_path, pieces(mine), with_frozen=False)


def test_the_checksum_of_frozen_weights_sees_order_and_not_sharding() -> None:
    pieces = training_pieces(*_train(0))
    whole = frozen_checksum(pieces, lambda total: total)
    bits = [int(number) for name in ("frozen.weight", "frozen.bias") for number in _bits(pieces.frozen, name)]
    positions = [1, 2, 3, 4, 1, 2]
    assert whole == {"torch.float32": sum(a * b for a, b in zip(bits, positions, strict=True)) % (1 << 62)}
    values = pieces.frozen[0].tensor
    values.copy_(values.flip(0))
    assert frozen_checksum(pieces, lambda total: total) != whole


def _bits(frozen: list[Piece], name: str) -> list[int]:
    return next(piece for piece in frozen if piece.name == name).tensor.view(torch.int32).tolist()


def test_a_checkpoint_of_another_training_is_refused() -> None:
    check_provenance(Path("checkpoint-3"), {"fingerprint": "aa", "wandb_run_id": "1"}, {"fingerprint": "aa"})
    with pytest.raises(ArtifactError, match=r"checkpoint-3 belongs to another training: its fingerprint is aa.*bb"):
        check_provenance(Path("checkpoint-3"), {"fingerprint": "aa"}, {"fingerprint": "bb"})


def test_saving_and_finding_by_one_process(tmp_path: Path) -> None:
    module, optimizer = _train(1)
    checkpoints = TrainingCheckpoints(module, optimizer, RUNTIME)
    for step in (1, 2):
        checkpoints.save(tmp_path / f"checkpoint-{step}", shared={"step": step}, own={"rank": 0})
    assert find_checkpoint(tmp_path, RUNTIME, 0) == (tmp_path / "checkpoint-2", [])
    (tmp_path / "checkpoint-2" / "weights-00000.safetensors").unlink()
    found, notes = find_checkpoint(tmp_path, RUNTIME, 0)
    assert found == tmp_path / "checkpoint-1"
    assert "checkpoint-2 is not a whole checkpoint: weights-00000.safetensors is missing" in notes[0]
    assert checkpoints.load(found) == ({"step": 1}, {"rank": 0})
    content = bytearray((found / "exp_avg-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (found / "exp_avg-00000.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"exp_avg-00000\.safetensors was altered"):
        checkpoints.load(found)


class Watching(Runtime):
    """One rank that notes which files there are whenever all hear of each other."""

    seen: ClassVar[list[set[str]]] = []
    folder: ClassVar[Path] = Path()

    def gather_objects(self, item: Any) -> list[Any]:
        self.seen.append({path.name for path in self.folder.iterdir()})
        return [item]


def test_the_ranks_meet_after_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank waits for longer than a file takes, however many there are."""
    monkeypatch.setattr(Watching, "seen", [])
    monkeypatch.setattr(Watching, "folder", tmp_path / "checkpoint-1.partial")
    runtime = Watching(0, 1, 0, torch.device("cpu"), "fp32")
    TrainingCheckpoints(*_train(1), runtime).save(tmp_path / "checkpoint-1", shared={"step": 1}, frozen_changed=True)
    sizes = [len(names) for names in Watching.seen]
    assert sizes[0] == 1
    assert max(after - before for before, after in pairwise(sizes)) <= 2  # a state is written with its tensors
    assert len(sizes) > 6


def test_shared_state_is_read_once_and_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = TrainingCheckpoints(*_train(1), RUNTIME)
    checkpoints.save(tmp_path / "checkpoint-1", shared={"average": torch.ones(5)})
    read: list[tuple[str, bool]] = []

    def noted(folder: Path, name: str, *, mapped: bool = False) -> dict[str, Any]:
        read.append((name, mapped))
        return read_state(folder, name, mapped=mapped)

    monkeypatch.setattr("rlhf.distributed.training_checkpoints.read_state", noted)
    shared, _ = checkpoints.load(tmp_path / "checkpoint-1")
    assert shared["average"].tolist() == [1] * 5
    assert read == [("shared", True), ("rank-00000", False)]


def test_the_reference_is_copied_by_the_main_rank_alone() -> None:
    state = TrainingState(update=1, guards=Guards(PPOConfig()), reference_changed=True)
    weights = {"weight": torch.ones(2)}
    for together, is_main, expected in [(False, True, weights), (False, False, {}), (True, False, weights)]:
        models: Any = SimpleNamespace(
            reference=SimpleNamespace(state_dict=lambda: weights), ranks_score_together=together
        )
        assert state.to_checkpoint(models, is_main=is_main)["reference"] == expected


def test_a_training_leaves_torch_s_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed replaces it under ZeRO-3; what another stage of the same process computes must not depend on that."""

    def prepare(job: object) -> None:
        def zero3_linear_wrap() -> None: ...

        zero3_linear_wrap.__module__ = "deepspeed.runtime.zero.linear"
        torch.nn.functional.linear = zero3_linear_wrap  # type: ignore[assignment]
        raise InterruptedError

    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", plain)
    monkeypatch.setattr(loop, "make_engine", prepare)
    with pytest.raises(InterruptedError):
        loop.train(cast(Any, SimpleNamespace(section=None, models=None, runtime=None)))
    assert torch.nn.functional.linear is plain
