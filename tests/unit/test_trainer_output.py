"""`PPOTrainer` with callbacks and an output folder: what it writes, stopping, and going on."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import rlhf
from rlhf import LoRAConfig, PPOCallback, TrainingView
from rlhf.distributed import stopping
from rlhf.errors import Stopped
from rlhf.stages.ppo.job import callback_states, load_callback_states
from rlhf.trainer.settings import weights_fingerprint
from tests.ppo_example import write_models
from tests.trainer_example import (
    PROMPTS,
    arguments,
    equal,
    language_model,
    make,
    process_state,
    reward_model,
    weights_of,
    words,
)

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


class Count(PPOCallback):
    """Counts updates, across resumes."""

    def __init__(self) -> None:
        self.num_updates = 0

    def on_update(self, view: TrainingView, step: int, metrics: Mapping[str, float]) -> None:
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_updates = state["num_updates"]


def test_a_callback_adds_metrics_and_stops(inputs: Models) -> None:
    recorder = Recorder(stop_after=2)
    result = make(inputs["policy"], callbacks=[recorder], args=arguments(num_updates=5)).train()
    assert recorder.calls == [("start", 0), ("update", 1), ("update", 2), ("end", 2)]
    assert result.num_updates == len(result.history) == 2
    assert result.history[0]["mine/double"] == 2 * result.history[0]["ppo/response_length"]
    assert result.metrics["mine/double"] == result.history[1]["mine/double"]


def test_where_a_callback_stops_the_training_has_ended_for_good(inputs: Models, tmp_path: Path) -> None:
    section = arguments(num_updates=3, save_every=2)
    stopped = make(inputs["policy"], args=section, output_dir=tmp_path, callbacks=[Recorder(stop_after=1)])
    stopped.train()
    recorder = Recorder()
    again = make(inputs["policy"], args=section, output_dir=tmp_path, callbacks=[recorder])
    result = again.train(resume=True)
    assert recorder.calls == [("start", 1), ("end", 1)]
    assert result.num_updates == len(result.history) == 1
    assert equal(weights_of(again.models.actor_critic), weights_of(stopped.models.actor_critic))


def test_a_signal_does_not_undo_a_callbacks_stop(
    inputs: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopTwice(PPOCallback):
        def on_update(self, view: TrainingView, step: int, metrics: Mapping[str, float]) -> None:
            view.stop = True
            monkeypatch.setattr(stopping._requests, "number", signal.SIGTERM)

    section = arguments(num_updates=2)
    with pytest.raises(Stopped, match="at step 1"):
        make(inputs["policy"], args=section, output_dir=tmp_path, callbacks=[StopTwice()]).train()
    monkeypatch.undo()
    assert make(inputs["policy"], args=section, output_dir=tmp_path).train(resume=True).num_updates == 1


def test_each_callback_gets_its_own_state_back() -> None:
    first, second = Count(), Count()
    first.num_updates, second.num_updates = 3, 5
    states = callback_states([first, Recorder(), second])
    new = [Count(), Count()]
    assert load_callback_states([*new, Recorder()], states) == []
    assert [callback.num_updates for callback in new] == [3, 5]
    (note,) = load_callback_states([Count()], states)
    assert "the state of callback Count 2" in note


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
    broken = make(inputs["policy"], args=section, output_dir=tmp_path, callbacks=[Count(), Recorder(fail_after=4)])
    with pytest.raises(RuntimeError, match="pulled the plug"):
        broken.train()
    recorder, count = Recorder(), Count()
    resumed = make(inputs["policy"], args=section, output_dir=tmp_path, callbacks=[recorder, count])
    result = resumed.train(resume=True)
    assert count.num_updates == 4
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
    other = make(inputs["policy"], output_dir=tmp_path, seed=7)
    (tmp_path / "trainer.json").write_text(json.dumps(other._settings()))
    with pytest.raises(rlhf.UserError, match="belongs to another training"):
        other.train(resume=True)
    with pytest.raises(rlhf.UserError, match="give the trainer the output_dir"):
        make(inputs["policy"]).train(resume=True)


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with other weights."""
    with torch.no_grad():
        next(iter(model.parameters())).add_(0.01)
    return model


def test_a_training_goes_on_with_what_it_began_with(inputs: Models, tmp_path: Path) -> None:
    section = arguments(ptx_coefficient=0.1)
    pairs = [{"prompt": "the film", "response": " was good"}]
    policy, reward = inputs["policy"], inputs["reward_model"]
    given: dict[str, Any] = {"reward_model": reward, "ptx_dataset": pairs, "args": section, "output_dir": tmp_path}
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "trainer.json").write_text(json.dumps(make(policy, **given)._settings()))

    def refused(model: Any = policy, **other: Any) -> str:
        trainer = make(model, **{**given, **other})
        with pytest.raises(rlhf.UserError, match="other settings") as caught:
            trainer.output.begin(trainer._settings(), resume=True)
        return str(caught.value)

    same = make(language_model(policy), **{**given, "ref_model": language_model(policy)})
    same.output.begin(same._settings(), resume=True)
    assert "(ref_model): it can go on only as it began. ref_model is by" in refused(changed(language_model(policy)))
    assert "(ref_model)" in refused(ref_model=changed(language_model(policy)))
    assert "(rewards.reward_model)" in refused(reward_model=changed(reward_model(reward)))
    assert "(ptx_dataset)" in refused(ptx_dataset=[*pairs, *pairs])
    lora: dict[str, Any] = {"reward_model": None, "reward_funcs": words, "ptx_dataset": None, "args": arguments()}
    (tmp_path / "trainer.json").write_text(
        json.dumps(make(policy, **{**given, **lora, "peft_config": LoRAConfig(rank=2, alpha=4)})._settings())
    )
    assert "(peft_config)" in refused(**lora, peft_config=LoRAConfig(rank=2, alpha=64))


def test_weights_are_told_apart_in_every_precision(inputs: Models) -> None:
    model = language_model(inputs["policy"])
    before = weights_fingerprint(model)
    assert weights_fingerprint(torch.nn.Module.to(model, torch.bfloat16)) == before
    assert weights_fingerprint(changed(model)) != before


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
