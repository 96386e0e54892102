"""`PPOTrainer`: the same training as the stage's, from objects in memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import rlhf
from rlhf.models.loading import load_tokenizer
from rlhf.records import prompt_to_json
from rlhf.stages.ppo import loop
from rlhf.stages.sampling import load_encoded_prompts
from tests.ppo_example import ppo_config, ppo_context, write_models
from tests.stage_example import metrics_of
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

ROOT = Path(__file__).parents[2]
Models = dict[str, str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    with process_state():
        yield


def without_speed(line: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if not name.startswith("perf/")}


# --- the same training ------------------------------------------------------------------------------------------------


def first_script(path: Path) -> str:
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next((block for block in blocks if "PPOTrainer(" in block), "")


def test_the_script_of_the_documentation_raises_the_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = first_script(ROOT / "docs" / "python.md")
    assert len(script.splitlines()) < 30
    assert first_script(ROOT / "README.md") in ("", script)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(script, "docs/python.md", "exec"), names)
    history = [line["ppo/raw_score_mean"] for line in names["result"].history]
    # Two words of fourteen are praised, and a response has eight places at most: about one hit at the start.
    assert history[0] < 1.5
    assert sum(history[-3:]) / 3 > 3.0
    assert "reward " in capsys.readouterr().out
    saved = language_model(str(tmp_path / "policy"))
    assert equal(saved.state_dict(), names["model"].state_dict())


def test_the_stage_and_the_trainer_give_the_same_weights(inputs: Models, tmp_path: Path) -> None:
    config = ppo_config(exact_kl_rows=2)
    loop.run(ppo_context(config, tmp_path / "run", inputs))
    tokenizer = load_tokenizer(inputs["policy"])
    prompts = load_encoded_prompts(config.data, tokenizer, print)["train"]
    trainer = make(
        inputs["policy"],
        reward_model=inputs["reward_model"],
        train_dataset=[{"prompt": prompt_to_json(prompt.content), **prompt.columns} for prompt in prompts],
        args=config.ppo,
        seed=config.seed,
    )
    result = trainer.train()
    trainer.save_model(tmp_path / "policy")
    trainer.save_value_model(tmp_path / "value")
    stage = tmp_path / "run" / "stages" / "ppo"
    for ours, theirs in (("policy", "model"), ("value", "value_model")):
        names = {file.name for file in (stage / theirs).iterdir()}
        assert names == {file.name for file in (tmp_path / ours).iterdir()}
        for name in names:
            assert (tmp_path / ours / name).read_bytes() == (stage / theirs / name).read_bytes(), name
    lines = metrics_of(tmp_path / "run", "ppo")
    assert [without_speed(line) for line in result.history] == [
        {name: value for name, value in line.items() if name != "stage"} for line in lines
    ]


def test_instances_give_what_their_folders_give(inputs: Models) -> None:
    by_path = make(inputs["policy"], reward_model=inputs["reward_model"])
    by_path.train()
    policy, reward = language_model(inputs["policy"]), reward_model(inputs["reward_model"])
    by_instance = make(policy, reward_model=reward)
    by_instance.train()
    assert by_instance.model is policy
    assert equal(weights_of(by_path.models.actor_critic), weights_of(by_instance.models.actor_critic))


def test_one_seed_gives_equal_weights_and_another_seed_others(inputs: Models) -> None:
    weights = []
    for seed in (1, 1, 2):
        trainer = make(language_model(inputs["policy"]), seed=seed)
        trainer.train()
        weights.append(weights_of(trainer.models.actor_critic))
    assert equal(weights[0], weights[1])
    assert not equal(weights[0], weights[2])


def test_only_policy_and_critic_are_trained(inputs: Models) -> None:
    """The reference copies the policy before training, and the critic copies the reward model."""
    policy, reward = language_model(inputs["policy"]), reward_model(inputs["reward_model"])
    before = {"policy": weights_of(policy), "reward": weights_of(reward)}
    trainer = make(policy, reward_model=reward, args=arguments(num_updates=3))
    result = trainer.train()
    assert not equal(weights_of(policy), before["policy"])
    assert equal(weights_of(reward), before["reward"])
    reference: Any = trainer.models.reference
    assert equal(weights_of(reference.model), before["policy"])
    critic: Any = trainer.models.actor_critic
    assert critic.critic.model is not reward
    assert not equal(weights_of(critic.critic.model), before["reward"])
    assert result.history[0]["ppo/kl_to_reference"] == pytest.approx(0.0, abs=1e-5)
    assert result.history[2]["ppo/kl_to_reference"] > 1e-4


def test_a_reference_of_its_own_has_a_kl_from_the_start(inputs: Models, tmp_path: Path) -> None:
    other = language_model(inputs["policy"])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    trainer = make(inputs["policy"], ref_model=other, args=arguments(num_updates=1))
    assert trainer.train().history[0]["ppo/kl_to_reference"] > 1e-3


def test_without_a_reward_model_the_critic_starts_at_zero(inputs: Models) -> None:
    critic: Any = make(inputs["policy"]).models.actor_critic
    assert not critic.critic.head.weight.any()
    learned: Any = make(inputs["policy"], reward_model=inputs["reward_model"]).models.actor_critic
    assert learned.critic.head.weight.any()
    asked: Any = make(
        inputs["policy"], reward_model=inputs["reward_model"], args=arguments(value_init="policy")
    ).models.actor_critic
    assert not asked.critic.head.weight.any()
    given: Any = make(inputs["policy"], value_model=reward_model(inputs["reward_model"])).models.actor_critic
    assert torch.equal(given.critic.head.weight, learned.critic.head.weight)


# --- rewards and data -------------------------------------------------------------------------------------------------


def test_functions_get_prompts_completions_and_columns(inputs: Models) -> None:
    seen: list[dict[str, Any]] = []

    def look(prompts: list[str], completions: list[str], answer: list[int], **rest: Any) -> list[float | None]:
        seen.append({"prompts": prompts, "completions": completions, "answer": answer, "rest": sorted(rest)})
        return [float(number) if number else None for number in answer]

    rows = [{"prompt": text, "answer": number, "note": "x"} for number, text in enumerate(PROMPTS)]
    trainer = make(
        inputs["policy"],
        train_dataset=Dataset.from_list(rows),
        reward_funcs={"answer": look, "words": words},
        reward_weights=[2.0, 0.5],
        args=arguments(num_updates=1, batch_size=4, num_minibatches=1),
    )
    result = trainer.train()
    assert len(seen) == 1
    assert [PROMPTS[number] for number in seen[0]["answer"]] == seen[0]["prompts"]
    assert all(isinstance(text, str) for text in seen[0]["completions"])
    assert seen[0]["rest"] == ["completion_ids", "note"]
    lengths = sum(words(seen[0]["completions"])) / 4
    # answers 1, 2, 3 count, 0 was left out: (1 + 2 + 3) / 3 as a part, 2 * 6 / 4 in the sum
    assert result.metrics["ppo/reward/answer"] == pytest.approx(2.0)
    assert result.metrics["ppo/reward/words"] == pytest.approx(lengths)
    assert result.metrics["ppo/score_mean"] == pytest.approx(3.0 + 0.5 * lengths)


def test_a_reward_models_statistics_come_with_its_folder(inputs: Models) -> None:
    """`write_models` notes a mean of 0.5 and a standard deviation of 2 beside the weights."""
    for source in (inputs["reward_model"], reward_model(inputs["reward_model"])):
        metrics = make(inputs["policy"], reward_model=source, args=arguments(num_updates=1)).train().metrics
        assert metrics["ppo/score_mean"] == pytest.approx((metrics["ppo/raw_score_mean"] - 0.5) / 2.0, abs=1e-5)
    section = arguments(num_updates=1, score_normalization="none")
    metrics = make(inputs["policy"], reward_model=inputs["reward_model"], args=section).train().metrics
    assert metrics["ppo/score_mean"] == pytest.approx(metrics["ppo/raw_score_mean"])


def test_rewards_of_the_config_join_those_of_the_arguments(inputs: Models) -> None:
    rewards = {"short": {"type": "length", "maximum": 1, "tolerance": 8, "weight": 3.0}}
    section = arguments(num_updates=1, rewards=rewards)
    trainer = make(
        inputs["policy"],
        reward_model=inputs["reward_model"],
        reward_funcs=words,
        reward_weights=[0.5, 2.0],
        args=section,
    )
    assert trainer.models.rewards.weights == {"reward_model": 0.5, "short": 3.0, "words": 2.0}
    twice = {"model": {"type": "model", "weight": 0.25}}
    trainer = make(inputs["policy"], reward_model=inputs["reward_model"], args=arguments(rewards=twice))
    assert trainer.models.rewards.weights == {"model": 0.25}


def test_functions_without_names_of_their_own_are_numbered(inputs: Models) -> None:
    trainer = make(inputs["policy"], reward_funcs=[words, words, lambda completions: [0.0] * len(completions)])
    assert trainer.models.rewards.names == ("words", "words_2", "lambda")


def test_conversations_go_through_the_chat_template(inputs: Models) -> None:
    tokenizer = load_tokenizer(inputs["policy"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    seen: list[Any] = []

    def look(prompts: Any, completions: Any) -> list[float]:
        seen.append((prompts, completions))
        return [float(len(turns[0]["content"])) for turns in completions]

    rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    trainer = make(
        inputs["policy"],
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        reward_funcs=look,
        args=arguments(num_updates=1),
    )
    trainer.train()
    assert tokenizer.decode(trainer.prompts[0].ids, skip_special_tokens=True) == f"user: {PROMPTS[0]}\n"
    assert seen[0][0][0][0]["role"] == "user"
    assert seen[0][1][0][0]["role"] == "assistant"


def test_demonstrations_are_mixed_in(inputs: Models) -> None:
    rows = [{"prompt": "the film", "response": " was good"}, {"prompt": "the book", "completion": " was bad"}]
    section = arguments(num_updates=1, ptx_coefficient=0.5, ptx_batch_size=2)
    trainer = make(inputs["policy"], ptx_dataset=rows, args=section)
    assert len(trainer.demonstrations) == 2
    assert trainer.train().metrics["ppo/ptx_loss"] > 0


# --- looking at it ----------------------------------------------------------------------------------------------------


def test_evaluation_means_over_the_held_out_prompts(inputs: Models) -> None:
    def answer(completions: list[str], answer: list[int]) -> list[float]:
        return [float(number) for number in answer]

    rows = [{"prompt": text, "answer": number} for number, text in enumerate(PROMPTS)]
    trainer = make(
        inputs["policy"],
        train_dataset=[{"prompt": "the", "answer": 0}, {"prompt": "and", "answer": 8}],
        reward_funcs=answer,
        eval_dataset=rows,
        eval_every=2,
        args=arguments(num_updates=3, rollout_batch_size=3),
    )
    before = trainer.evaluate()
    assert before["eval/score_mean"] == before["eval/raw_score_mean"] == 1.5
    result = trainer.train()
    assert ["eval/score_mean" in line for line in result.history] == [False, True, True]
    assert result.metrics["eval/score_mean"] == 1.5
    assert trainer.evaluate() == {name: value for name, value in result.metrics.items() if name.startswith("eval/")}
    assert trainer.evaluate(rows[2:])["eval/score_mean"] == 2.5
    assert set(before) == {
        "eval/score_mean",
        "eval/raw_score_mean",
        "eval/response_length",
        "eval/stopped_fraction",
    }


def test_responses_follow_from_the_seed(inputs: Models) -> None:
    trainer = make(inputs["policy"])
    first = trainer.generate([PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    assert first == trainer.generate([PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    assert first[0] != first[1]
    assert first[::2] != trainer.generate([PROMPTS[0], PROMPTS[1]], seed=5)
    assert trainer.generate(PROMPTS[1])[0] == first[2]
    trainer.train()
    assert len(trainer.generate(PROMPTS)) == len(PROMPTS)


def test_the_names_of_the_package_are_lazy() -> None:
    assert set(rlhf.__all__) <= set(dir(rlhf))
    for name in rlhf.__all__:
        assert getattr(rlhf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'PPO2Trainer'"):
        rlhf.PPO2Trainer  # type: ignore[attr-defined]  # noqa: B018


def test_the_caller_keeps_its_tokenizer(inputs: Models) -> None:
    tokenizer = load_tokenizer(inputs["policy"])
    before = copy.deepcopy(tokenizer.init_kwargs)
    tokenizer.pad_token = None
    trainer = make(inputs["policy"], processing_class=tokenizer)
    assert trainer.tokenizer is not tokenizer
    assert trainer.tokenizer.pad_token is not None
    assert tokenizer.pad_token is None
    assert tokenizer.init_kwargs == before
