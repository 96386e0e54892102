"""Stage evaluate: the responses it keeps; its judges: a reward model by path, a language model in both orders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.chat.asking import make_chat
from rlhf.config import RLHFConfig
from rlhf.config.compose import load_config
from rlhf.config.stages import LanguageModelJudge
from rlhf.errors import ConfigError, UserError
from rlhf.evaluation.judge_checks import check_judge, judge_values
from rlhf.evaluation.pair_judge import PairJudge
from rlhf.models.scratch import build_from_scratch
from rlhf.pipeline import decided_by, preflight, resolve_inputs
from rlhf.runs.folder import RunFolder
from rlhf.stages import evaluate
from rlhf.stages.evaluation_judges import load_reward
from tests.chat_server import Reply, chat_server, said
from tests.collect_example import write_reward_model
from tests.stage_example import make_context, tiny_config, write_demonstrations
from tests.unit.test_annotators_judge import BLOCK
from tests.unit.test_chat_local import save_model


def judge_at(address: str, **fields: Any) -> PairJudge:
    config = LanguageModelJudge(**({"address": address, "model_name": "m", "cache": None} | fields))
    return PairJudge(config, make_chat(config, "evaluate.judge"), None, seed=1)


def sides(body: dict[str, Any]) -> dict[str, str]:
    """The responses that the question shows, by letter."""
    return dict(BLOCK.findall(body["messages"][0]["content"]))


def test_both_orders_are_asked_and_their_mean_counts() -> None:
    """`good` wins in both orders, `biased` only where it is first, `unclear` gets no verdict; equal texts are a tie."""
    shown: list[str] = []

    def script(body: dict[str, Any], number: int) -> Reply:
        letters = sides(body)
        shown.append(letters["A"])
        texts = set(letters.values())
        if "unclear" in texts:
            return said("I cannot say")
        if "biased" in texts:
            return said("Verdict: A")
        return said("Verdict: A" if letters["A"] == "good" else "Verdict: B")

    with chat_server(script) as server:
        judge = judge_at(server.address)
        found = judge.compare(["p1", "p2", "p3", "p4"], ["good", "biased", "unclear", "same"], ["x", "x", "x", "same"])
    assert found == [1.0, 0.5, 0.5, 0.5]
    assert len(shown) == 6
    figures = judge.figures(0.95)
    # Three choices for A (one of good, two of biased) of four; one of two pairs agrees; one of three is unreadable.
    assert figures["judge_first_share"]["value"] == 0.75
    assert figures["judge_consistency"]["value"] == 0.5
    assert figures["judge_unreadable_share"]["value"] == pytest.approx(1 / 3)


def test_one_order_is_random_by_seed_and_prompt() -> None:
    prompts = [f"prompt {number}" for number in range(40)]
    with chat_server(lambda body, number: said("Verdict: A")) as server:
        judge = judge_at(server.address, both_orders=False)
        found = judge.compare(prompts, ["own"] * 40, ["other"] * 40)
        again = judge_at(server.address, both_orders=False).compare(prompts[::-1], ["own"] * 40, ["other"] * 40)
    # A judge that always takes the first one says nothing: about half of the verdicts are wins.
    assert 10 <= sum(found) <= 30
    assert again == found[::-1]
    assert judge.figures(0.95)["judge_first_share"]["value"] == 1.0
    assert "judge_consistency" not in judge.figures(0.95)


def test_log_probs_of_a_model_in_memory(tmp_path: Path) -> None:
    config = LanguageModelJudge(model=str(save_model(tmp_path)), cache=None, logprobs=True, template=None)
    template = "{prompt} {first} {second}"
    judge = PairJudge(config, make_chat(config, "evaluate.judge"), template, seed=1)
    (forward,) = judge.compare(["which"], ["the film is good"], ["the film is bad"])
    (backward,) = judge.compare(["which"], ["the film is bad"], ["the film is good"])
    assert 0 < forward < 1
    assert forward != 0.5
    # With both orders, whose response it is makes no difference.
    assert forward + backward == pytest.approx(1.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations, a policy, a baseline and a reward model."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_demonstrations(folder / "data")
    scratch = tiny_config(folder).model.scratch
    texts = [f"the test film {number} was good bad fine great poor" for number in range(9)]
    for seed, name in enumerate(("policy", "baseline")):
        model, tokenizer = build_from_scratch(scratch, texts, seed=seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_reward_model(folder, str(folder / "policy"))
    return folder


def evaluated(folder: Path, run: Path, judge: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the lines of responses.jsonl."""
    config = tiny_config(
        folder, evaluate={"judge": judge, "num_prompts": 5, "sampling": {"max_response_tokens": 6, "batch_size": 4}}
    )
    inputs = {"policy": str(folder / "policy"), "baseline": str(folder / "baseline")}
    inputs |= {"reference": inputs["baseline"], "judge.path": str(folder / "reward_model")}
    output = evaluate.run(make_context(config, run, "evaluate", inputs))
    assert output.outputs == ["responses.jsonl"]
    lines = (run / "stages/evaluate/responses.jsonl").read_text().splitlines()
    return output.summary, [json.loads(line) for line in lines]


def test_all_responses_are_kept(files: Path, tmp_path: Path) -> None:
    summary, lines = evaluated(files, tmp_path, {"type": "reward_model", "path": str(files / "reward_model")})
    assert (summary["judge"], summary["judge_model"].rpartition("/")[2]) == ("reward_model", "reward_model")
    assert len(lines) == summary["num_prompts"] == 5
    assert len({line["prompt_id"] for line in lines}) == 5
    for role in ("policy", "baseline"):
        scores = [line[role]["score"] for line in lines]
        assert sum(scores) / 5 == pytest.approx(summary[f"judge_score_{role}"]["value"])
        lengths = [line[role]["length"] for line in lines]
        assert sum(lengths) / 5 == pytest.approx(summary[f"response_length_{role}"]["value"])
        assert all(isinstance(line[role]["stopped"], bool) and line[role]["response"] is not None for line in lines)
    kl = [line["policy"]["kl"] for line in lines]
    assert sum(kl) / 5 == pytest.approx(summary["kl_to_reference"]["value"])
    assert all("kl" not in line["baseline"] and "reward_model_score" not in line["policy"] for line in lines)


def test_a_language_model_judges_the_stage(files: Path, tmp_path: Path) -> None:
    with chat_server(lambda body, number: said("Verdict: A")) as server:
        judge = {"type": "language_model", "address": server.address, "model_name": "m", "cache": None}
        summary, lines = evaluated(files, tmp_path, judge)
    assert summary["judge_model"].startswith("m at http://")
    assert summary["win_rate"]["value"] == 0.5
    assert summary["judge_first_share"]["value"] == 1.0
    assert summary["judge_consistency"]["value"] == 0.0
    assert all(line["policy"]["score"] + line["baseline"]["score"] == 1.0 for line in lines)


def test_a_judge_that_is_no_reward_model_is_named_by_its_key(files: Path, tmp_path: Path) -> None:
    inputs = {"policy": str(files / "policy"), "judge.path": str(files / "baseline")}
    context = make_context(tiny_config(files), tmp_path, "evaluate", inputs)
    with pytest.raises(UserError, match=r"evaluate\.judge\.path"):
        load_reward(context, "judge.path")


def config_with(*arguments: str) -> RLHFConfig:
    return load_config(["experiment=smoke", *arguments]).config


def test_what_the_judge_is_decides_the_result(files: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def judged(*arguments: str) -> dict[str, Any]:
        config = config_with(*arguments)
        inputs = resolve_inputs(config, run, "evaluate")
        body = decided_by(config, run, "evaluate", {k: v for k, v in inputs.items() if k.startswith("judge")}, "")
        return {"judge": body["section"]["judge"], "inputs": body["inputs"]}

    own = judged("evaluate.judge.type=reward_model")
    assert own == {"judge": {"type": "reward_model"}, "inputs": {}}
    named = judged(f"evaluate.judge={{type: reward_model, path: {files / 'reward_model'}}}")
    assert named["judge"] == own["judge"]
    assert list(named["inputs"]) == ["judge.path"]
    language = f"evaluate.judge={{type: language_model, model: {files / 'policy'}"
    one, more = judged(f"{language}}}"), judged(f"{language}, batch_size: 3}}")
    assert one == more
    assert one != judged(f"{language}, both_orders: false}}")
    assert list(one["inputs"]) == ["judge.model"]
    template = tmp_path / "question.txt"
    template.write_text("{prompt} {first} {second}")
    assert judge_values(LanguageModelJudge(model="x/y", template=str(template)))["template"].startswith("{prompt}")


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (
            "type: reward_model, path: nowhere/at/all",
            r"judge\.path: there is no model folder .*nowhere",
        ),
        (
            "type: language_model, model: nowhere/at/all",
            r"judge\.model: there is no model folder .*nowhere",
        ),
        ("type: language_model", "either a model .* or an address; neither"),
        ("type: language_model, model: a/b, both_order: true", r"did you mean evaluate\.judge\.both_orders"),
        ("type: language_model, model: a/b, template: none.txt", r"evaluate\.judge\.template=none\.txt"),
        ("type: gold, path: x", "evaluate.judge.type=reward_model"),
        (
            "type: language_model, address: 'http://localhost:1/v1', model_name: m, api_key_variable: RLHF_NO_KEY",
            r"evaluate\.judge\.api_key_variable=RLHF_NO_KEY",
        ),
    ],
)
def test_mistakes_are_known_before_torch(judge: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(config_with(f"evaluate.judge={{{judge}}}"), RunFolder(tmp_path))


def test_other_judges_have_nothing_to_check() -> None:
    check_judge(config_with().evaluate.judge)
    assert re.fullmatch("gold", config_with().evaluate.judge.type)
