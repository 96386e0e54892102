"""`PPOTrainer` with callbacks and an output folder: what it writes, stopping, and going on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import rlhf
from rlhf import PPOCallback, TrainingView
from tests.ppo_example import write_models
from tests.trainer_example import PROMPTS, arguments, equal, language_model, make, process_state, weights_of

Models = dict[str, str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    with process_state():
        yield


def test_settings_that_transformers_would_not_save_are_mended(inputs: Models, tmp_path: Path) -> None:
    """Some published models set a temperature without sampling."""
    model = language_model(inputs["policy"])
    assert model.generation_config is not None
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.5
    trainer = make(model, args=arguments(num_updates=1))
    trainer.train()
    assert language_model(str(trainer.save_model(tmp_path))).generation_config is not None


class Recorder(PPOCallback):
    """Notes what it is called with; may stop, or fail, after an update."""

    def __init__(self, *, stop_after: int | None = None, fail_after: int | None = None) -> None:
        self.stop_after, self.fail_after = stop_after, fail_after
        self.calls: list[tuple[str, int]] = []

    def on_start(self, view: TrainingView, update: int) -> None:
        self.calls.append(("start", update))

    def on_update(self, view: TrainingView, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        self.calls.append(("update", step))
        view.stop = step == self.stop_after
        if step == self.fail_after:
            raise RuntimeError("pulled the plug")
        return {"mine/double": 2 * metrics["ppo/response_length"]}

    def on_end(self, view: TrainingView, step: int) -> None:
        self.calls.append(("end", step))


def test_a_callback_adds_metrics_and_stops(inputs: Models) -> None:
    recorder = Recorder(stop_after=2)
    result = make(inputs["policy"], callbacks=[recorder], args=arguments(num_updates=5)).train()
    assert recorder.calls == [("start", 0), ("update", 1), ("update", 2), ("end", 2)]
    assert result.num_updates == len(result.history) == 2
    assert result.history[0]["mine/double"] == 2 * result.history[0]["ppo/response_length"]
    assert result.metrics["mine/double"] == result.history[1]["mine/double"]


def test_nothing_is_written_without_an_output_folder(
    inputs: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(inputs["policy"]).train()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
    make(inputs["policy"], verbose=True).train()
    assert "ppo 2/2" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_output_folder_holds_numbers_samples_and_checkpoints(inputs: Models, tmp_path: Path) -> None:
    trainer = make(inputs["policy"], output_dir=tmp_path / "out")
    result = trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["ppo/loss"] for line in lines] == [line["ppo/loss"] for line in result.history]
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["prompt"] in PROMPTS
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-1").is_dir()
    assert trainer.save_model() == tmp_path / "out" / "model"
    language_model(str(tmp_path / "out" / "model"))


def test_an_interrupted_training_goes_on_bit_for_bit(inputs: Models, tmp_path: Path) -> None:
    section = arguments(num_updates=4, save_every=2, score_normalization="running", ema_decay=0.5)
    whole = make(inputs["policy"], args=section)
    expected = whole.train()
    broken = make(inputs["policy"], args=section, output_dir=tmp_path, callbacks=[Recorder(fail_after=4)])
    with pytest.raises(RuntimeError, match="pulled the plug"):
        broken.train()
    recorder = Recorder()
    resumed = make(inputs["policy"], args=section, output_dir=tmp_path, callbacks=[recorder])
    result = resumed.train(resume=True)
    assert recorder.calls == [("start", 2), ("update", 3), ("update", 4), ("end", 4)]
    assert equal(weights_of(resumed.models.actor_critic), weights_of(whole.models.actor_critic))
    losses = [line["ppo/loss"] for line in expected.history]
    assert [line["ppo/loss"] for line in result.history] == losses
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    resumed.save_model(tmp_path / "resumed")
    whole.save_model(tmp_path / "whole")
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("resumed", "whole")]
    assert saved[0] == saved[1]


def test_a_folder_with_a_training_is_not_overwritten(inputs: Models, tmp_path: Path) -> None:
    make(inputs["policy"], output_dir=tmp_path).train()
    with pytest.raises(rlhf.UserError, match=r"holds a training already.*train\(resume=True\)"):
        make(inputs["policy"], output_dir=tmp_path).train()
    with pytest.raises(rlhf.UserError, match=r"other settings \(args.kl_coefficient, seed\)"):
        make(inputs["policy"], output_dir=tmp_path, args=arguments(kl_coefficient=0.3), seed=7).train(resume=True)
    with pytest.raises(rlhf.UserError, match="give the trainer the output_dir"):
        make(inputs["policy"]).train(resume=True)


def test_a_training_that_never_began_leaves_the_folder_free(inputs: Models, tmp_path: Path) -> None:
    """The self-test stops a reward that is the same for all; with a better one the folder serves again."""
    with pytest.raises(rlhf.UserError, match="same score"):
        make(inputs["policy"], reward_funcs=lambda completions: [1.0] * len(completions), output_dir=tmp_path).train()
    make(inputs["policy"], output_dir=tmp_path).train()


def test_a_trainer_trains_once(inputs: Models) -> None:
    trainer = make(inputs["policy"])
    with pytest.raises(rlhf.UserError, match=r"call train\(\) before"):
        trainer.save_model("anywhere")
    trainer.train()
    with pytest.raises(rlhf.UserError, match="trained already"):
        trainer.train()
