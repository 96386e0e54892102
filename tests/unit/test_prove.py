"""`rlhf prove`: what stands for what, what is made small, what a line says; and one proof to its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import RLHFConfig
from rlhf.config.compose import load_config
from rlhf.data import load_prompts
from rlhf.data.tokenization import encode_prompt
from rlhf.errors import ConfigError
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.models.scalar import ScalarModel
from rlhf.proving.command import Proof, prove, run_prove
from rlhf.proving.known_models import config_of, known_config
from rlhf.proving.scaling import changes, scaled
from rlhf.proving.stand_ins import named_models, names_of_data, write_data
from rlhf.proving.tiny_models import write_tiny

PAPER = "experiment=paper/lm_human_preferences"


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def paper(name: str, *arguments: str) -> RLHFConfig:
    return load_config([f"experiment=paper/{name}", *arguments]).config


@pytest.mark.parametrize(
    ("path", "model_type", "width"),
    [
        ("EleutherAI/pythia-1b-deduped", "gpt_neox", 2048),
        ("tlc4418/pythia_70m_sft", "gpt_neox", 512),
        ("openai-community/gpt2-large", "gpt2", 1280),
        ("huggyllama/llama-7b", "llama", 4096),
        ("alpaca_farm_models/reward-model-human", "llama", 4096),
        ("facebook/opt-1.3b", "opt", 2048),
        ("Ray2333/reward-model-Mistral-7B-instruct-Unified-Feedback", "mistral", 4096),
        ("siebert/sentiment-roberta-large-english", "roberta", 1024),
    ],
)
def test_models_are_known_by_name(path: str, model_type: str, width: int) -> None:
    found = known_config(path)
    assert found is not None
    assert (found.model_type, found.hidden_size) == (model_type, width)


def test_an_unknown_model_is_like_model_path_or_refused() -> None:
    fallback = known_config("gpt2")
    assert config_of("runs/else/stages/reward_model/model", fallback, None)[0] is fallback
    with pytest.raises(ConfigError, match="nobody/nothing is not known here"):
        config_of("nobody/nothing", None, None)


@pytest.mark.parametrize(
    "path", ["gpt2", "EleutherAI/pythia-160m", "huggyllama/llama-7b", "facebook/opt-125m", "mistral-7b"]
)
def test_a_tiny_model_is_of_the_same_architecture_and_loads(path: str, tmp_path: Path) -> None:
    real = known_config(path)
    assert real is not None
    write_tiny(tmp_path / "policy", real, "policy", ["a b c d"] * 5, seed=1)
    policy, tokenizer = load_policy(tmp_path / "policy"), load_tokenizer(tmp_path / "policy")
    assert policy.config.model_type == real.model_type
    assert sum(part.numel() for part in policy.parameters()) < 500_000
    # What is no size stays: shared key-value heads, the share of a head that is turned.
    grouped = getattr(real, "num_key_value_heads", 0) and real.num_key_value_heads < real.num_attention_heads
    assert not grouped or policy.config.num_key_value_heads < policy.config.num_attention_heads
    assert encode_prompt(tokenizer, "a b")
    write_tiny(tmp_path / "scorer", real, "scorer", ["a b c d"] * 5, seed=1)
    assert ScalarModel.load(tmp_path / "scorer").model.config.num_labels == 1


def test_every_model_that_a_stage_loads_is_named_once_for_each_use() -> None:
    found = {(model.path, model.role): model.keys for model in named_models(paper("overoptimisation_coste"))}
    policy, gold = "tlc4418/pythia_1.4b_sft_policy", "alpaca_farm_models/reward-model-human"
    assert set(found) == {(policy, "policy"), ("tlc4418/pythia_70m_sft", "policy"), (gold, "scorer")}
    assert found[policy, "policy"] == (("model", "path"), ("ppo", "policy"), ("best_of_n", "policy"))
    # A stage that is not run loads nothing.
    config = paper("overoptimisation_coste", "stages=[reward_model]")
    assert {model.path for model in named_models(config)} == {policy, "tlc4418/pythia_70m_sft"}


def test_only_sizes_change_and_every_change_is_said() -> None:
    config = paper("secrets")
    small = scaled(config)
    assert small.ppo.batch_size == 8
    assert small.ppo.critic_warmup_updates == 1
    assert small.ppo.num_updates == 3
    keys = {line.partition(":")[0] for line in changes(config, small)}
    assert "ppo.batch_size" in keys
    kept = ("clip_low", "kl_coefficient", "score_normalization", "score_clip", "lam", "value_init", "num_minibatches")
    assert all(getattr(small.ppo, name) == getattr(config.ppo, name) for name in kept)
    sizes = {"batch_size", "micro_batch_size", "rollout_batch_size", "num_updates", "critic_warmup_updates"}
    sizes |= {"warmup_updates", "ptx_batch_size", "max_response_tokens", "self_test", "guards", "save_every"}
    assert {key for key in keys if key.startswith("ppo.")} <= {f"ppo.{name}" for name in {*sizes, "exact_kl_rows"}}
    assert changes(config, config) == []


def test_batches_keep_their_minibatches_and_groups() -> None:
    config = paper("tldr_1b", "ppo.num_minibatches=32", "ppo.responses_per_prompt=16", "ppo.max_response_tokens=20")
    small = scaled(config)
    assert (small.ppo.batch_size, small.ppo.max_response_tokens) == (32, 20)


def test_nothing_outside_its_folder_is_written_and_nobody_is_asked() -> None:
    config = paper("imdb_sentiment", "preferences.store=labels.sqlite", "run.dir=mine")
    small = scaled(config)
    assert (small.preferences.store, small.run.dir, small.tracking.wandb) == (None, None, "disabled")
    assert small.preferences.annotator == config.preferences.annotator
    with pytest.raises(ConfigError, match="whom a proof cannot wait for"):
        scaled(paper("imdb_sentiment", "preferences.annotator=human", "preferences.kind=pairwise"))


def test_a_data_set_nobody_knows_needs_a_format(tmp_path: Path) -> None:
    config = paper("hh", "data.path=someone/something", "data.format=auto")
    with pytest.raises(ConfigError, match=r"data\.path=someone/something is no data set.*data\.format"):
        write_data(config, tmp_path)
    found, notes = write_data(paper("hh", "data.path=someone/something"), tmp_path)
    assert (tmp_path / "data/dataset_dict.json").is_file()
    assert notes == [
        "data: someone/something (not known here: columns of format hh) by 72 rows of train, validation, test"
    ]
    assert found.data != config.data
    # A file that is there is read as it is.
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "response": " b"}) + "\n")
    assert write_data(paper("hh", "data=files", f"data.path={rows}", "data.format=auto"), tmp_path)[1] == [
        "data: as it is"
    ]


def test_a_message_names_the_data_set_and_not_its_stand_in(tmp_path: Path) -> None:
    """The folder of the stand-in is gone when the message is read."""
    config = paper("alpacafarm", "data.prompts.split=unlabelled")
    small, _ = write_data(config, tmp_path)
    lines: list[str] = []
    proof = Proof(show=lines.append, names=names_of_data(config, small))
    with proof.part("data"):
        load_prompts(small.data)
    assert proof.failed == 1
    assert "data.prompts.split=unlabelled: tatsu-lab/alpaca_farm (its stand-in) has no such split" in lines[0]
    assert str(tmp_path) not in lines[0]


def test_a_configuration_that_a_known_data_set_has_not_is_refused(tmp_path: Path) -> None:
    human = "data.comparisons.name=alpaca_human_preference"
    assert "alpaca_farm by 48 rows of preference" in write_data(paper("alpacafarm", human), tmp_path)[1][1]
    with pytest.raises(
        ConfigError, match=r"data\.comparisons\.name=alpaca_human_pref: .*Did you mean alpaca_human_pref"
    ):
        write_data(paper("alpacafarm", "data.comparisons.name=alpaca_human_pref"), tmp_path / "again")
    with pytest.raises(ConfigError, match=r"data\.prompts\.name=None: .* no such configuration; it has alpaca_instr"):
        write_data(paper("alpacafarm", "data.prompts.name=null"), tmp_path / "none")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("until=end", "expected one of config, plan, data, steps"),
        ("keep=", "expected the name of a folder"),
        ("keep=/", "empty or not there yet"),
    ],
)
def test_its_own_arguments_are_checked(argument: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_prove([PAPER, argument])


def test_a_config_that_does_not_fit_its_gpus_fails(tmp_path: Path) -> None:
    lines: list[str] = []
    proof = Proof(show=lines.append)
    prove(paper("tldr_6.9b", "distributed.num_processes=1", "zero=none"), tmp_path, "plan", proof)
    assert proof.failed == 1
    assert lines[1].startswith("FAIL  plan")
    assert "fits: no" in lines[1]
    assert "first change:" in lines[1]


def test_a_proof_to_its_end_runs_every_stage_and_a_broken_one_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Choices among four, token ids, truncation, adaptive KL and a shared trunk, all in one process."""
    assert run_prove([PAPER, f"keep={tmp_path / 'kept'}"]) == 0
    lines = capfd.readouterr().out.splitlines()
    steps = [line.split()[:4] for line in lines if "steps of" in line]
    assert steps == [["PASS", "steps", "of", name] for name in ("reward_model", "ppo", "evaluate", "report")]
    assert any(line.strip() == "ppo.num_updates: 1954 -> 2" for line in lines)
    assert lines[-1].startswith("PASS  paper_lm_human_preferences")
    metrics = [json.loads(line) for line in (tmp_path / "kept/run/metrics.jsonl").read_text().splitlines()]
    updates: list[dict[str, Any]] = [row for row in metrics if row["stage"] == "ppo"]
    assert len(updates) == 2
    # Every response has its 24 tokens.
    assert {row["ppo/response_length"] for row in updates} == {24.0}
