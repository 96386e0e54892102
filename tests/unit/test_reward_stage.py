"""Stage reward_model beyond the plain pair: losses and gradients against slow loops, ratings, normalisation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf.config.model import ScratchConfig
from rlhf.config.reward_model import RewardModelConfig
from rlhf.data.splits import Splits
from rlhf.data.tokenization import EncodedPair, encode_pair
from rlhf.distributed.runtime import Runtime
from rlhf.errors import ConfigError, DataError
from rlhf.models import ScalarModel, build_from_scratch, ensure_distinct_pad, load_tokenizer, response_scores
from rlhf.models.scalar import pad_pairs
from rlhf.models.seq2seq import decoder_values
from rlhf.records import Comparison, RatedResponse, Record, dump_line
from rlhf.stages import reward_model
from rlhf.stages.reward_measures import HeldOut, Normalizer, encode_all, measure
from rlhf.stages.reward_objectives import Example, TrainingSet, comparison_set, encoded_rows, rating_set
from rlhf.stages.reward_trainer import ExampleCollator, ObjectiveTrainer, causal_values
from tests.stage_example import make_context, metrics_of, tiny_config

SIZES: dict[str, dict[str, Any]] = {"llama": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 300}}
SIZES["t5"] = {"architecture": "t5", **SIZES["llama"]}
# Uneven groups: prompts with two, three and four responses, soft labels, ties, margins.
ROWS = [
    Comparison("the film", " was good", " was bad at all times", margin=1.0),
    Comparison("a longer film", " was fine", " was poor", probability=0.7, agreement=0.5, source="lab"),
    Comparison("a longer film", " was fine", " was bad", margin=0.5, agreement=1.0, source="web"),
    Comparison("a longer film", " was bad", " was poor", probability=0.5, margin=2.0),
    Comparison("one", " great", " good"),
    Comparison("one", " great", " fine and good"),
    Comparison("one", " great", " bad bad bad"),
    Comparison("one", " good", " fine and good"),
    Comparison("one", " good", " bad bad bad", probability=0.9),
    Comparison("one", " fine and good", " bad bad bad"),
]
ORDERS = [row for row in ROWS if row.probability is None and row.prompt in ("the film", "one")]
ORDERS += [Comparison("one", " good", " bad bad bad")]
RATINGS = [
    RatedResponse(row.prompt, row.chosen, float(number % 4), source=row.source) for number, row in enumerate(ROWS)
]


class Case:
    """A tiny model with its tokenizer."""

    def __init__(self, architecture: str) -> None:
        config = ScratchConfig.model_validate(SIZES[architecture])
        policy, tokenizer = build_from_scratch(config, ["the film was good and bad"] * 9, seed=3)
        self.scalar = ScalarModel.from_policy(policy, seed=1)
        self.tokenizer = ensure_distinct_pad(tokenizer, self.scalar.model)


@pytest.fixture(scope="module", params=["llama", "t5"])
def case(request: pytest.FixtureRequest) -> Case:
    """Not to be changed."""
    return Case(request.param)


def section(loss: dict[str, Any], **values: Any) -> RewardModelConfig:
    return RewardModelConfig.model_validate({"loss": loss, **values})


def set_of(config: RewardModelConfig) -> TrainingSet:
    if config.loss.type == "rating":
        return rating_set(config, RATINGS)
    return comparison_set(config, ORDERS if config.loss.type in ("plackett_luce", "best_of_k") else ROWS)


def trained_loss(case: Case, config: RewardModelConfig, sizes: list[int] | None = None) -> tuple[float, list[Tensor]]:
    """The loss and gradients of one optimiser step over all examples, in micro-batches of these sizes, in float64."""
    model = case.scalar.model.double()
    training = set_of(config)
    trainer = object.__new__(ObjectiveTrainer)
    trainer.section, trainer.objective = config, training.objective
    columns = encoded_rows(case.tokenizer, training.examples)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    values = _t5_values if case.scalar.encoder_decoder else causal_values
    model.zero_grad()
    total, start = 0.0, 0
    for size in sizes or [len(rows)]:
        batch = ExampleCollator(model)(rows[start : start + size])
        start += size
        labels = batch.pop("labels")
        assert labels.shape == (size,)
        loss, labels_per_term, _ = trainer.loss_sum(_Called(model, values), batch, labels)
        assert labels_per_term == 1
        share: Any = loss / len(rows)
        share.backward()
        total += float(share.detach())
    assert start == len(rows)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return total, [gradient.clone() for gradient in gradients]


class _Called(nn.Module):
    """A model that is called for its values in all states, in its own precision."""

    def __init__(self, model: nn.Module, values: Any) -> None:
        super().__init__()
        self.model, self.values = model, values

    def forward(self, **inputs: Tensor) -> Tensor:
        values: Tensor = self.values(self.model, **inputs)
        return values


def _t5_values(model: nn.Module, **inputs: Tensor) -> Tensor:
    return decoder_values(model, **inputs)


def slow_loss(case: Case, config: RewardModelConfig) -> Tensor:
    """Every response of every pair read alone, and formulas written out."""
    scalar, loss = ScalarModel(case.scalar.model.double()), config.loss
    training = set_of(config)

    def score(example: Example, place: int) -> Tensor:
        text = encode_pair(case.tokenizer, example.prompt, example.responses[place])
        return response_scores(scalar, *pad_pairs(scalar, [text], pad_id=0))[0]

    total = torch.zeros((), dtype=torch.float64)
    for example in training.examples:
        if loss.type == "rating":
            s, t = score(example, 0), example.targets[0]
            if loss.form == "squared":
                total = total + 0.5 * (s - t) ** 2
            else:
                total = total - t * torch.log(torch.sigmoid(s)) - (1 - t) * torch.log(1 - torch.sigmoid(s))
        elif loss.type == "plackett_luce":
            scores = [score(example, place) for place in range(len(example.responses))]
            for place in range(len(scores)):
                total = total - torch.log(scores[place].exp() / sum(other.exp() for other in scores[place:]))
        elif loss.type == "best_of_k":
            scores = [score(example, place) for place in range(len(example.responses))]
            total = total - torch.log(scores[0].exp() / sum(other.exp() for other in scores))
        else:
            for pair, (better, worse) in enumerate(example.pairs):
                first, second, p = score(example, better), score(example, worse), example.probabilities[pair]
                p = p * (1 - loss.label_smoothing) + (1 - p) * loss.label_smoothing
                lead = first - second - example.margins[pair]
                term = -p * F.logsigmoid(lead) - (1 - p) * F.logsigmoid(-lead)
                charge = config.center_coefficient * (first + second) ** 2
                total = total + (term + charge) / len(example.pairs)
    return total / len(training.examples)


LOSSES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "bradley_terry", "use_margin": True, "label_smoothing": 0.1}, {}),
    ({"type": "kwise", "use_margin": True}, {"center_coefficient": 0.3}),
    ({"type": "plackett_luce"}, {}),
    ({"type": "best_of_k"}, {}),
    ({"type": "rating"}, {}),
    ({"type": "rating", "form": "logistic"}, {}),
]


@pytest.mark.parametrize(("loss", "values"), LOSSES, ids=lambda value: str(value.get("type", "")))
def test_rows_37_to_40_loss_and_gradients_are_those_of_single_responses(
    case: Case, loss: dict[str, Any], values: dict[str, Any]
) -> None:
    """Padding, the order of responses, and how examples are shared out over micro-batches make no difference."""
    config = section(loss, **values)
    model = case.scalar.model.double()
    model.zero_grad()
    expected: Any = slow_loss(case, config)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    num = len(set_of(config).examples)
    for sizes in (None, [1, num - 1]):
        found, own = trained_loss(case, config, sizes)
        # Scores are float32 whatever the weights are.
        assert found == pytest.approx(float(expected.detach()), rel=1e-6)
        scale = max(float(gradient.abs().max()) for gradient in gradients)
        for gradient, wanted in zip(own, gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, atol=1e-5 * scale, rtol=1e-4)


KNOBS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"ties": "leave_out"}, {}),
    ({"ties": "davidson"}, {}),
    ({"ties": "rao_kupper"}, {}),
    ({"ties": "davidson", "tie_parameter": 2.0}, {}),
    ({"ties": "rao_kupper", "tie_parameter": 2.0}, {}),
    ({"use_margin": True}, {}),
    ({"label_smoothing": 0.2}, {}),
    ({"weight_by_agreement": True}, {}),
    ({}, {"source_weights": {"lab": 3.0}}),
    ({}, {"center_coefficient": 0.1}),
]


@pytest.mark.parametrize("kind", ["bradley_terry", "kwise"])
def test_every_knob_changes_the_gradient(kind: str) -> None:
    case = Case("llama")
    found = [trained_loss(case, section({"type": kind}))]
    found += [trained_loss(case, section({"type": kind, **knobs}, **values)) for knobs, values in KNOBS]
    losses = [loss for loss, _ in found]
    norms = [float(torch.stack([gradient.norm() for gradient in gradients]).norm()) for _, gradients in found]
    assert len({round(loss, 9) for loss in losses}) == len(found)
    assert len({round(norm, 9) for norm in norms}) == len(found)


def write_splits(folder: Path, rows: list[Any]) -> str:
    """The rows as all three splits."""
    folder.mkdir(parents=True, exist_ok=True)
    records: list[Record] = rows
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(dump_line(record) + "\n" for record in records))
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy to start from, and prompts in data files beside it."""
    folder = tmp_path_factory.mktemp("base")
    config = ScratchConfig.model_validate(SIZES["llama"])
    policy, tokenizer = build_from_scratch(config, ["the film was good and bad"] * 9, seed=3)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    (folder / "data").mkdir()
    for split, size in (("train", 9), ("validation", 2), ("test", 1)):
        lines = [{"prompt": f"the {split} film {number}", "response": " was good"} for number in range(size)]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(base: Path, folder: Path, values: dict[str, Any], **inputs: str) -> dict[str, Any]:
    """The stage's summary. Three steps of three examples, log of the first."""
    steps = {"batch_size": 3, "max_steps": 3, "log_every": 1, "schedule": "constant"}
    config = tiny_config(base, reward_model={**steps, **values})
    context = make_context(config, folder, "reward_model", {"base": str(base / "policy"), **inputs})
    return reward_model.run(context).summary


def statistics_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "stages/reward_model/model/rlhf_reward.json").read_text())
    return found


def test_row_40_the_stage_trains_kwise_on_the_mean_over_prompts(base: Path, tmp_path: Path) -> None:
    comparisons = write_splits(tmp_path / "comparisons", ROWS)
    values: dict[str, Any] = {"loss": {"type": "kwise"}, "max_steps": 2}
    summary = run(base, tmp_path / "whole", values, comparisons=comparisons)
    run(base, tmp_path / "pieces", {**values, "micro_batch_size": 1}, comparisons=comparisons)
    whole, pieces = (metrics_of(tmp_path / name, "reward_model") for name in ("whole", "pieces"))
    case = Case("llama")
    case.scalar = ScalarModel.from_policy(base / "policy", seed=1)
    expected = float(slow_loss(case, section({"type": "kwise"})).detach())
    assert whole[0]["reward_model/loss"] == pytest.approx(expected, rel=1e-5)
    for name in ("loss", "grad_norm", "accuracy", "margin", "score_mean"):
        assert pieces[0][f"reward_model/{name}"] == pytest.approx(whole[0][f"reward_model/{name}"], rel=1e-4), name
    assert summary["num_train"] == 3
    assert summary["num_ties"] == 1
    # Nine of the ten comparisons have a better side.
    lines = [
        json.loads(line)
        for line in (tmp_path / "whole/stages/reward_model/held_out_scores.jsonl").read_text().splitlines()
    ]
    decided = [line for line in lines if line["split"] == "test" and line["comparison"].get("probability") != 0.5]
    assert len(decided) == 9
    right = sum(line["chosen_scores"][0] > line["rejected_scores"][0] for line in decided)
    assert summary["accuracy"]["value"] == pytest.approx(right / 9)


@pytest.mark.parametrize("kind", ["kwise", "rating"])
def test_encoder_decoder_models_train_on_our_losses(tmp_path: Path, kind: str) -> None:
    """The last bias moves for ratings alone: no difference of scores depends on it."""
    case = Case("t5")
    policy, tokenizer = build_from_scratch(ScratchConfig.model_validate(SIZES["t5"]), ["the film was good"] * 9, seed=3)
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    rows: list[Any] = RATINGS if kind == "rating" else ROWS
    name = "ratings" if kind == "rating" else "comparisons"
    values: dict[str, Any] = {"loss": {"type": kind}, "batch_size": len(RATINGS) if kind == "rating" else 3}
    values |= {"micro_batch_size": 1, "ratings": "x"} if kind == "rating" else {}
    run(tmp_path, tmp_path / "run", values, **{name: write_splits(tmp_path / name, rows)})
    case.scalar = ScalarModel.from_policy(tmp_path / "policy", seed=1)
    case.tokenizer = load_tokenizer(tmp_path / "policy")
    expected = float(slow_loss(case, section({"type": kind})).detach())
    assert metrics_of(tmp_path / "run", "reward_model")[0]["reward_model/loss"] == pytest.approx(expected, rel=1e-5)
    trained = ScalarModel.load(tmp_path / "run/stages/reward_model/model")
    bias: Any = trained.head.bias
    assert (float(bias.abs().max().detach()) > 0) == (kind == "rating")


def test_in_bf16_the_loss_is_that_of_float32_but_for_the_weights(base: Path, tmp_path: Path) -> None:
    comparisons = write_splits(tmp_path / "comparisons", ROWS)
    section = {"loss": {"type": "kwise"}, "batch_size": 3, "max_steps": 2, "log_every": 1}
    config = tiny_config(base, reward_model=section)
    runtime = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), precision="bf16")
    inputs = {"base": str(base / "policy"), "comparisons": comparisons}
    reward_model.run(make_context(config, tmp_path / "bf16", "reward_model", inputs, runtime))
    run(base, tmp_path / "fp32", {"loss": {"type": "kwise"}}, comparisons=comparisons)
    found, expected = (metrics_of(tmp_path / name, "reward_model")[0] for name in ("bf16", "fp32"))
    assert found["reward_model/loss"] == pytest.approx(expected["reward_model/loss"], abs=0.02)
    assert found["reward_model/loss"] != expected["reward_model/loss"]


def test_a_rating_model_learns_ratings_and_says_how_well(base: Path, tmp_path: Path) -> None:
    words = ["good", "fine", "bad", "poor"]
    rows = [RatedResponse(f"film {n % 3}", f" was {words[n % 4]}", 7.0 - 2 * (n % 4)) for n in range(12)]
    values = {"loss": {"type": "rating"}, "max_steps": 60, "batch_size": 12, "learning_rate": 3e-3, "log_every": 20}
    summary = run(base, tmp_path / "run", {**values, "ratings": "x"}, ratings=write_splits(tmp_path / "ratings", rows))
    assert summary["rating_correlation"] > 0.95
    assert summary["rating_rmse"] < 0.8
    assert summary["accuracy"]["value"] > 0.9
    found = statistics_of(tmp_path / "run")
    assert found["measured_on"] == "ratings"
    assert found["rating_scale"] == {"form": "squared", "origin": 4.0, "unit": pytest.approx(math.sqrt(5))}
    assert metrics_of(tmp_path / "run", "reward_model")[-1]["reward_model/squared_error"] < 0.2
    with pytest.raises(ConfigError, match="rated responses are wanted"):
        run(base, tmp_path / "no", values)


def test_scores_are_measured_on_what_normalization_says(base: Path, tmp_path: Path) -> None:
    """Of one model, the mean and the deviation of the texts that are named."""
    comparisons = write_splits(tmp_path / "comparisons", ROWS)
    sampling = {"max_response_tokens": 5, "batch_size": 4}
    sampled: dict[str, Any] = {"type": "sft_responses", "num_responses": 11, "sampling": sampling}
    values = {"max_steps": 1, "normalization": sampled, "num_comparisons": 4}
    summary = run(base, tmp_path, values, comparisons=comparisons)
    assert (summary["num_train"], summary["num_validation"], summary["num_test"]) == (4, len(ROWS), len(ROWS))
    folder = tmp_path / "stages/reward_model/model"
    tokenizer, scalar = load_tokenizer(folder), ScalarModel.load(folder)
    pairs = encode_all(tokenizer, ROWS)
    held_out = HeldOut(Splits([], ROWS, ROWS), {"train": [], "validation": pairs, "test": pairs})

    def measured(kind: dict[str, Any]) -> tuple[dict[str, Any], list[EncodedPair] | None]:
        context = make_context(
            tiny_config(base, reward_model={"normalization": kind}), tmp_path, "reward_model", inputs
        )
        normalizer = Normalizer(context, tokenizer)
        return measure(context, folder, tokenizer, held_out, normalizer).statistics, normalizer.texts()

    inputs = {"base": str(base / "policy")}
    found = {}
    kinds: dict[str, tuple[dict[str, Any], int]] = {
        "comparisons": ({"type": "comparisons"}, 2 * len(ROWS)),
        "demonstrations": ({"type": "demonstrations"}, 2),
        "sft_responses": (sampled, 11),
        "more": ({**sampled, "num_responses": 20}, 20),
        "longer": ({**sampled, "sampling": {**sampling, "max_response_tokens": 9}}, 11),
    }
    for name, (kind, num_scores) in kinds.items():
        found[name], texts = measured(kind)
        assert found[name]["num_scores"] == num_scores
        assert found[name]["measured_on"] == kind["type"]
        read = [text for pair in pairs for text in pair] if texts is None else texts
        scores = torch.stack([response_scores(scalar, *pad_pairs(scalar, [text], pad_id=0))[0] for text in read])
        assert found[name]["score_mean"] == pytest.approx(float(scores.mean().detach()), abs=1e-5)
        assert found[name]["score_std"] == pytest.approx(float(scores.std(correction=0).detach()), abs=1e-5)
    assert len({entry["score_mean"] for entry in found.values()}) == len(kinds)
    assert statistics_of(tmp_path) == found["sft_responses"]
    # A mean that is shifted alone.
    shifted = measured({**sampled, "scale": False})[0]
    assert shifted == {**found["sft_responses"], "score_std": 1.0}
    texts = measured(sampled)[1]
    assert texts is not None
    # Nine prompts, so the first two have a second response; none is longer than was asked for.
    assert [text.prompt_ids for text in texts[:2]] == [text.prompt_ids for text in texts[9:]]
    assert texts[0].response_ids != texts[9].response_ids
    assert max(len(text.response_ids) for text in texts) <= 5


def test_adapters_and_gradient_checkpointing_train_on_our_losses_too(base: Path, tmp_path: Path) -> None:
    comparisons = write_splits(tmp_path / "comparisons", ROWS)
    lines = []
    for checkpointing in (False, True):
        section: dict[str, Any] = {"loss": {"type": "kwise"}, "gradient_checkpointing": checkpointing}
        section |= {"batch_size": 3, "max_steps": 3, "log_every": 1, "schedule": "constant"}
        config = tiny_config(base, reward_model=section, peft={"type": "lora", "rank": 2})
        inputs = {"base": str(base / "policy"), "comparisons": comparisons}
        folder = tmp_path / f"run-{checkpointing}"
        reward_model.run(make_context(config, folder, "reward_model", inputs))
        lines.append(metrics_of(folder, "reward_model"))
        assert (folder / "stages/reward_model/model/adapter_model.safetensors").is_file()
    assert lines[0][2]["reward_model/loss"] != lines[0][0]["reward_model/loss"]
    for plain, recomputed in zip(*lines, strict=True):
        assert recomputed["reward_model/loss"] == pytest.approx(plain["reward_model/loss"], rel=1e-5)
        assert recomputed["reward_model/grad_norm"] == pytest.approx(plain["reward_model/grad_norm"], rel=1e-4)


def test_what_is_missing_or_too_long_stops_the_stage_before_training(base: Path, tmp_path: Path) -> None:
    bare = write_splits(tmp_path / "bare", [Comparison("p", " was good", " was bad")])
    with pytest.raises(DataError, match="two responses only"):
        run(base, tmp_path / "kwise", {"loss": {"type": "kwise"}}, comparisons=bare)
    # A held-out rating that is in no pair, and a demonstration: longer than the model's positions.
    ratings = Path(write_splits(tmp_path / "ratings", RATINGS))
    (ratings / "test.jsonl").write_text(dump_line(RatedResponse("alone", " good" * 400, 1.0)) + "\n")
    with pytest.raises(ConfigError, match="the model has 256 positions"):
        run(base, tmp_path / "rating", {"loss": {"type": "rating"}, "ratings": "x"}, ratings=str(ratings))
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "the film", "response": " good" * 400}) + "\n")
    data = {"path": str(tmp_path / "long.jsonl"), "max_response_tokens": 2000}
    config = tiny_config(base, reward_model={"normalization": {"type": "demonstrations"}}, data=data)
    inputs = {"base": str(base / "policy"), "comparisons": bare}
    with pytest.raises(ConfigError, match="the model has 256 positions"):
        reward_model.run(make_context(config, tmp_path / "long", "reward_model", inputs))
