"""Stage ppo around the maths: which prompts, which scores, which minibatches, and what an update changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.batches import PPOBatch, make_ppo_batch
from rlhf.config.ppo import PPOConfig
from rlhf.config.stages import SamplingConfig
from rlhf.errors import ConfigError
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.models.sampling import Suppressed
from rlhf.models.scoring import response_logprobs
from rlhf.ops.moments import RunningMoments
from rlhf.stages.ppo import loop
from rlhf.stages.ppo.job import Callback, TrainingView
from rlhf.stages.ppo.prepare import load_models, prepare_job
from rlhf.stages.ppo.rollout import choose_prompts, gather_experience, transform_scores
from rlhf.stages.ppo.state import TrainingState
from rlhf.stages.ppo.update import Updater, minibatches, num_micro_batches
from rlhf.stages.sampling import EncodedPrompt, sampling_rules, stop_token_ids
from tests.ppo_example import ppo_config, ppo_context, write_models
from tests.stage_example import metrics_of, weight_bytes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


def _prompts(num: int) -> list[EncodedPrompt]:
    return [EncodedPrompt(f"prompt {i}", i, [i]) for i in range(num)]


def test_every_pass_uses_every_prompt_once_and_the_update_number_decides() -> None:
    prompts = _prompts(10)
    rows = [row for update in range(4) for row in choose_prompts(prompts, update, 5, seed=1)]
    first, second = [r.prompt.key for r in rows[:10]], [r.prompt.key for r in rows[10:]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert choose_prompts(prompts, 3, 5, seed=1) == rows[15:]
    assert choose_prompts(prompts, 0, 5, seed=2) != rows[:5]


def test_a_prompt_that_comes_twice_in_a_batch_is_another_sample() -> None:
    rows = choose_prompts(_prompts(3), 0, 8, seed=1)
    assert len({(row.prompt.key, row.sample_index) for row in rows}) == 8


def _transformed(
    section: PPOConfig, raw: list[float], stopped: list[bool] | None = None, lengths: list[int] | None = None
) -> list[float]:
    flags = torch.tensor(stopped if stopped is not None else [True] * len(raw))
    counts = torch.tensor(lengths if lengths is not None else [1] * len(raw))
    moments = RunningMoments() if section.score_normalization == "running" else None
    return transform_scores(torch.tensor(raw), flags, counts, section, moments).tolist()


def test_scores_are_clipped_then_charged() -> None:
    section = PPOConfig(score_clip=1.5, missing_eos_penalty=1.0)
    # 0 stays; 2 -> 1.5, minus 1 because it never stopped; -4 -> -1.5
    assert _transformed(section, [0.0, 2.0, -4.0], [True, False, True]) == [0.0, 0.5, -1.5]
    assert _transformed(PPOConfig(), [1.0, 5.0, -7.0]) == [1.0, 5.0, -7.0]


def test_row_19_a_penalty_may_replace_the_score_of_a_response_that_never_stopped() -> None:
    section = PPOConfig(missing_eos_penalty=1.0, missing_eos_mode="replace")
    assert _transformed(section, [3.0, 3.0], [True, False]) == [3.0, -1.0]


def test_length_is_charged_beyond_the_free_tokens() -> None:
    section = PPOConfig(length_penalty=0.5, length_penalty_free_tokens=4)
    # 3 and 4 tokens are free, 6 tokens are 2 too many: minus 1
    assert _transformed(section, [1.0, 1.0, 1.0], lengths=[3, 4, 6]) == [1.0, 1.0, 0.0]


def test_running_normalisation_knows_all_scores_so_far() -> None:
    section = PPOConfig(score_normalization="running")
    moments = RunningMoments()
    stopped, lengths = torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.long)
    first = transform_scores(torch.tensor([1.0, 3.0]), stopped, lengths, section, moments)
    assert first.tolist() == [-1.0, 1.0]  # mean 2, deviation 1
    second = transform_scores(torch.tensor([5.0, 7.0]), stopped, lengths, section, moments)
    # of 1, 3, 5, 7: mean 4, variance 5
    torch.testing.assert_close(second, torch.tensor([1.0, 3.0]) / 5**0.5)


def test_several_responses_to_a_prompt_are_neighbours_and_different_samples() -> None:
    rows = choose_prompts(_prompts(10), 0, 6, seed=1, responses_per_prompt=3)
    assert [row.sample_index for row in rows] == [0, 1, 2, 0, 1, 2]
    assert len({row.prompt.key for row in rows[:3]}) == 1
    assert rows[0].prompt.key != rows[3].prompt.key


def test_minibatches_are_one_permutation_and_differ_by_epoch() -> None:
    section = PPOConfig(batch_size=12, num_minibatches=3)
    first = minibatches(12, section, seed=1, update=0, epoch=0)
    assert [len(part) for part in first] == [4, 4, 4]
    assert sorted(torch.cat(first).tolist()) == list(range(12))
    second = minibatches(12, section, seed=1, update=0, epoch=1)
    assert torch.cat(first).tolist() != torch.cat(second).tolist()


@pytest.mark.parametrize(("micro", "ranks", "expected"), [(None, 1, 1), (4, 1, 2), (3, 1, 3), (4, 2, 1), (100, 2, 1)])
def test_num_micro_batches(micro: int | None, ranks: int, expected: int) -> None:
    assert num_micro_batches(PPOConfig(batch_size=16, num_minibatches=2, micro_batch_size=micro), ranks) == expected


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    section = PPOConfig(num_updates=4, warmup_updates=1, schedule="linear")
    # warm-up factor 1/2, 1, 1, 1 times 1, 3/4, 1/2, 1/4
    assert [loop.learning_rate_factor(section, u) for u in range(4)] == [0.5, 0.75, 0.5, 0.25]
    constant = PPOConfig(num_updates=4, schedule="constant")
    assert [loop.learning_rate_factor(constant, u) for u in range(4)] == [1.0] * 4


def _first_update(
    folder: Path, inputs: dict[str, str], **ppo: Any
) -> tuple[dict[str, Tensor], dict[str, float], PPOBatch]:
    """Runs one update by hand; the weights after it, its statistics and the batch it was trained on."""
    config = ppo_config(**ppo)
    job = prepare_job(ppo_context(config, folder, inputs))
    engine, section, state = loop.make_engine(job), config.ppo, TrainingState.start(config.ppo)
    experience = gather_experience(engine, job.models, job.prompts, section, job.runtime, config.seed, 0)
    batch = loop.make_batch(experience, section, state, state.kl_coefficient)
    updater = Updater(engine, section, job.runtime, 1, job.models.scoring, job.demonstrations, job.models.pad_id)
    statistics = updater.optimise(batch, 0, state.kl_coefficient)
    return engine.unwrapped.state_dict(), statistics.means(job.runtime, section, state.kl_coefficient), batch


def test_rows_8_and_24_the_first_step_has_ratio_one_and_no_kl(inputs: dict[str, str], tmp_path: Path) -> None:
    _, metrics, batch = _first_update(tmp_path, inputs, num_epochs=1, num_minibatches=1)
    assert metrics["ppo/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ppo/approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["ppo/clip_fraction"] == 0.0
    assert float(batch.kl.abs().max()) == 0.0


def test_row_11_micro_batches_do_not_change_the_update(inputs: dict[str, str], tmp_path: Path) -> None:
    whole, metrics, _ = _first_update(tmp_path / "whole", inputs, num_minibatches=1)
    for size in (1, 3, 4):
        parts, others, _ = _first_update(tmp_path / f"parts{size}", inputs, num_minibatches=1, micro_batch_size=size)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6, msg=name)
        for name, number in metrics.items():
            assert others[name] == pytest.approx(number, rel=1e-4, abs=1e-6), name


def test_row_27_one_update_changes_every_parameter(inputs: dict[str, str], tmp_path: Path) -> None:
    before = load_models(ppo_context(ppo_config(), tmp_path, inputs)).actor_critic.state_dict()
    after, _, _ = _first_update(tmp_path, inputs)
    # Rows of the embedding that no text of the batch holds get no gradient; the matrix as a whole does.
    unchanged = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert unchanged == []


def test_row_23_training_the_policy_leaves_the_reference_alone(inputs: dict[str, str], tmp_path: Path) -> None:
    context = ppo_context(ppo_config(), tmp_path, inputs)
    loop.run(context)
    trained, reference = load_policy(context.stage.model), load_policy(inputs["reference"])
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.bool)
    results = [
        response_logprobs(model, input_ids=ids, attention_mask=mask, num_prompt=2, temperature=1.0)
        for model in (trained, reference)
    ]
    assert not torch.allclose(results[0], results[1])
    torch.testing.assert_close(
        results[1],
        response_logprobs(
            load_policy(inputs["policy"]), input_ids=ids, attention_mask=mask, num_prompt=2, temperature=1.0
        ),
    )


def test_row_7_rescoring_reproduces_the_sampled_logprobs(inputs: dict[str, str], tmp_path: Path) -> None:
    for temperature in (0.7, 1.0):
        run = tmp_path / str(temperature)
        loop.run(ppo_context(ppo_config(temperature=temperature), run, inputs))
        assert max(line["ppo/sampling_logprob_error"] for line in metrics_of(run, "ppo")) < 1e-4


def test_row_6_the_logged_objective_is_made_of_the_logged_parts(inputs: dict[str, str], tmp_path: Path) -> None:
    loop.run(ppo_context(ppo_config(kl_coefficient=0.3), tmp_path, inputs))
    first, second = metrics_of(tmp_path, "ppo")
    assert first["ppo/kl_to_reference"] == 0.0
    assert second["ppo/kl_to_reference"] != 0.0
    for line in (first, second):
        expected = line["ppo/score_mean"] - 0.3 * line["ppo/kl_penalty"]
        assert line["ppo/objective"] == pytest.approx(expected, rel=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_a_resumed_run_too(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ppo_config(num_updates=3)
    for name in ("first", "second"):
        loop.run(ppo_context(config, tmp_path / name, inputs))
    assert weight_bytes(tmp_path / "first", "ppo") == weight_bytes(tmp_path / "second", "ppo")
    assert metrics_of(tmp_path / "first", "ppo") == metrics_of(tmp_path / "second", "ppo")

    context = ppo_context(config, tmp_path / "killed", inputs)
    real = make_ppo_batch
    calls = 0

    def die_in_the_third_update(*arguments: Any, **named: Any) -> PPOBatch:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise InterruptedError("killed")
        return real(*arguments, **named)

    monkeypatch.setattr(loop, "make_ppo_batch", die_in_the_third_update)
    with pytest.raises(InterruptedError):
        loop.run(context)
    # The second attempt has one update left to do.
    calls = 10
    loop.run(context)
    assert calls == 11
    monkeypatch.undo()
    assert weight_bytes(tmp_path / "killed", "ppo") == weight_bytes(tmp_path / "first", "ppo")
    assert metrics_of(tmp_path / "killed", "ppo") == metrics_of(tmp_path / "first", "ppo")
    assert (tmp_path / "killed/samples.jsonl").read_text() == (tmp_path / "first/samples.jsonl").read_text()


# Each field changes the result of a tiny run: one that does not has no code behind it (correctness row 26).
KNOBS: dict[str, Any] = {
    "value_init": "policy",
    "num_updates": 3,
    "batch_size": 16,
    "num_epochs": 1,
    "num_minibatches": 1,
    "temperature": 0.7,
    "max_response_tokens": 5,
    "learning_rate": 2e-3,
    "value_learning_rate": 5e-3,
    "schedule": "constant",
    "warmup_updates": 1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-3,
    "weight_decay": 0.5,
    "max_grad_norm": 0.01,
    "kl_coefficient": 0.5,
    "kl_estimator": "k3",
    "gamma": 0.9,
    "lam": 0.5,
    "clip_low": 0.001,
    "clip_high": 0.001,
    "value_clip": 0.001,
    "value_coefficient": 1.0,
    "whiten_advantages": False,
    "rewards": {"short": {"type": "length", "maximum": 2, "tolerance": 4}},
    "score_normalization": "running",
    "score_clip": 0.01,
    "missing_eos_penalty": 2.0,
    "missing_eos_mode": ("replace", {"missing_eos_penalty": 2.0}),
    "length_penalty": 0.3,
    "length_penalty_free_tokens": (4, {"length_penalty": 0.3}),
    "score_position": "after_eos",
    "whiten_rewards": True,
    "value_network": "shared_trunk",
    "reference_refresh_every": 1,
    "ema_decay": 0.5,
    "responses_per_prompt": 4,
    "min_response_tokens": 6,
    "stop_tokens": (tuple("abcdefghijklmnopqrstuvwxyz"), {}),
    "truncate_token": ("e", {"missing_eos_penalty": 2.0}),
    "truncate_after": (4, {"truncate_token": "<|eos|>", "missing_eos_penalty": 2.0}),
    "critic_warmup_updates": 1,
    "adam_epsilon_placement": "tensorflow",
    "kl_placement": "loss",
    "kl_target_nats_per_sequence": 1e-4,
    "kl_horizon_episodes": (20, {"kl_target_nats_per_sequence": 1e-4, "kl_coefficient": 1.0}),
    "kl_stop_nats_per_token": 1e-9,
    "dual_clip": (1.01, {"learning_rate": 0.1, "clip_high": 10.0}),
    "loss_aggregation": "sequence_mean",
    "entropy_coefficient": 0.5,
    "ptx_coefficient": 1.0,
    "ptx_batch_size": (4, {"ptx_coefficient": 1.0}),
}
# These name inputs, sizes that must not change the result, or what is written how often.
NOT_KNOBS = {
    "policy",
    "reference",
    "reward_model",
    "value_model",
    "micro_batch_size",
    "rollout_batch_size",
    "gradient_checkpointing",
    "logprob_chunk_tokens",
    "exact_kl_rows",
    "self_test",
    "guards",
    "samples_every",
    "num_samples_shown",
    "pass_metrics_updates",
    "save_every",
    "keep_checkpoints",
}


def test_row_26_every_field_is_either_a_knob_or_bookkeeping() -> None:
    assert set(KNOBS) | NOT_KNOBS == set(PPOConfig.model_fields)


@pytest.fixture(scope="module")
def plain_run(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain")
    loop.run(ppo_context(ppo_config(kl_coefficient=0.05), run, inputs))
    return run


@pytest.mark.parametrize("knob", sorted(KNOBS))
def test_row_26_every_knob_works(knob: str, inputs: dict[str, str], plain_run: Path, tmp_path: Path) -> None:
    given = dict(inputs)
    if knob in ("value_init", "value_network"):
        del given["value_model"]
    value = KNOBS[knob]
    if isinstance(value, tuple):
        # A field that means something beside others only: the run without it has those.
        value, others = value
        loop.run(ppo_context(ppo_config(**others), tmp_path / "plain", given))
        plain_run = tmp_path / "plain"
    else:
        others = {}
    loop.run(ppo_context(ppo_config(**others, **{knob: value}), tmp_path / "changed", given))
    changed = tmp_path / "changed"
    assert weight_bytes(changed, "ppo") != weight_bytes(plain_run, "ppo") or (
        _value_weights(changed) != _value_weights(plain_run)
    )


def _value_weights(run: Path) -> bytes:
    return (run / "stages/ppo/value_model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rollout_batch_size", 3),
        ("gradient_checkpointing", True),
        ("micro_batch_size", 2),
        ("logprob_chunk_tokens", 3),
        ("exact_kl_rows", 0),
        ("self_test", False),
        ("guards", "off"),
    ],
)
def test_sizes_change_rounding_only(
    field: str, value: object, inputs: dict[str, str], plain_run: Path, tmp_path: Path
) -> None:
    loop.run(ppo_context(ppo_config(**{field: value}), tmp_path, inputs))
    for ours, theirs in zip(metrics_of(tmp_path, "ppo"), metrics_of(plain_run, "ppo"), strict=True):
        for name in ("ppo/loss", "ppo/score_mean", "ppo/grad_norm", "ppo/entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_what_is_kept_on_disk(inputs: dict[str, str], tmp_path: Path) -> None:
    context = ppo_context(
        ppo_config(num_updates=5, save_every=1, keep_checkpoints=2, samples_every=2), tmp_path, inputs
    )
    loop.run(context)
    assert sorted(path.name for path in context.stage.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-5"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert steps == [1, 1, 3, 3, 5, 5]


def test_row_20_stop_tokens_are_eos_and_special_tokens_only(inputs: dict[str, str]) -> None:
    model, tokenizer = load_policy(inputs["policy"]), load_tokenizer(inputs["policy"])
    ordinary = int(tokenizer.encode("film", add_special_tokens=False)[0])
    # What a config made without its tokenizer names: the class's default, here an ordinary token.
    model.generation_config.eos_token_id = [ordinary, tokenizer.bos_token_id]
    assert stop_token_ids(model, tokenizer) == sorted([tokenizer.eos_token_id, tokenizer.bos_token_id])


def test_the_embedding_at_which_scores_are_read_is_trained(inputs: dict[str, str], tmp_path: Path) -> None:
    model, tokenizer = load_policy(inputs["policy"]), load_tokenizer(inputs["policy"])
    model.config.pad_token_id = tokenizer.eos_token_id  # as in every tokenizer without a pad token of its own
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    again = load_policy(str(tmp_path / "padded"))
    again(input_ids=torch.tensor([[5, 6, tokenizer.eos_token_id, 7]])).logits.sum().backward()
    gradients = {name: parameter.grad for name, parameter in again.named_parameters()}
    gradient = gradients["model.embed_tokens.weight"]
    assert gradient is not None
    assert float(gradient[tokenizer.eos_token_id].abs().sum()) > 0


def test_a_reward_model_with_another_tokenizer_scores_the_text(inputs: dict[str, str], tmp_path: Path) -> None:
    from rlhf.config.model import ScratchConfig
    from rlhf.models.saving import save_model
    from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
    from rlhf.models.scratch import build_from_scratch

    scratch = ScratchConfig(num_layers=1, hidden_size=16, num_heads=2, vocab_size=300, max_positions=128)
    model, tokenizer = build_from_scratch(scratch, ["quite other words make other merges"] * 50, seed=1)
    save_model(model, tokenizer, tmp_path / "base")
    reward = ScalarModel.from_policy(tmp_path / "base", seed=1)
    reward.save(tmp_path / "other", ensure_distinct_pad(tokenizer, reward.model))
    given = {**inputs, "reward_model": str(tmp_path / "other"), "value_model": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match="value_init=policy"):
        load_models(ppo_context(ppo_config(), tmp_path / "run", given))
    del given["value_model"]
    loop.run(ppo_context(ppo_config(value_init="policy"), tmp_path / "run", given))
    assert metrics_of(tmp_path / "run", "ppo")[0]["ppo/score_std"] > 0


def test_the_average_comes_back_to_the_main_rank_alone(inputs: dict[str, str], tmp_path: Path) -> None:
    """The others have no weights to put it into when the policy is published."""
    models = load_models(ppo_context(ppo_config(), tmp_path, inputs))
    state = TrainingState.start(PPOConfig(ema_decay=0.5))
    assert state.average is not None
    state.average.update({"policy.x": torch.ones(2)})
    saved = state.to_checkpoint(models)
    for is_main in (True, False):
        other = TrainingState.start(PPOConfig(ema_decay=0.5))
        other.from_checkpoint(saved, models, is_main=is_main)
        assert other.average is not None
        assert bool(other.average.weights) == is_main


def test_a_callback_ends_the_training(inputs: dict[str, str], tmp_path: Path) -> None:
    class Stop(Callback):
        def on_update(self, view: TrainingView, step: int, metrics: Any) -> None:
            view.stop = step == 2

    job = dataclasses.replace(prepare_job(ppo_context(ppo_config(num_updates=4), tmp_path, inputs)), callbacks=[Stop()])
    assert loop.train(job).state.update == 2
    assert [line["step"] for line in metrics_of(tmp_path, "ppo")] == [1, 2]


def test_what_samples_in_other_stages_stops_as_ppo_does(inputs: dict[str, str]) -> None:
    model, tokenizer = load_policy(inputs["policy"]), load_tokenizer(inputs["policy"])
    rules = sampling_rules(
        model, tokenizer, SamplingConfig(stop_tokens=("e",), min_response_tokens=3), "evaluate.sampling"
    )
    assert rules[0] == stop_token_ids(model, tokenizer, ("e",))
    assert rules[1] == Suppressed(tuple(rules[0]), 3)
    with pytest.raises(ConfigError, match=r"evaluate\.sampling\.stop_tokens names 'a whole sentence'"):
        sampling_rules(model, tokenizer, SamplingConfig(stop_tokens=("a whole sentence",)), "evaluate.sampling")
