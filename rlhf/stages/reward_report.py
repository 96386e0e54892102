"""Stage reward_report: what a reward model is worth on comparisons, and on a benchmark from a file.

Any reward model will do: this run's, another folder, a hub id, an ensemble. Responses that are too long for the model's
positions are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data import gives_comparisons
from rlhf.data.tokenization import encode_pair
from rlhf.errors import DataError
from rlhf.evaluation.reward_bench import BenchmarkRow, RowScores, benchmark_report, read_benchmark
from rlhf.evaluation.reward_exhibits import benchmark_exhibits
from rlhf.evaluation.reward_quality import SCHEMA, QualitySettings
from rlhf.models.loading import load_tokenizer
from rlhf.records import Comparison, PromptContent
from rlhf.runs.exhibits import Exhibits
from rlhf.runs.files import write_json, write_text
from rlhf.runs.jsonable import dump_json
from rlhf.runs.tracking import Tracker
from rlhf.stages.comparisons import comparisons_of
from rlhf.stages.context import StageContext, StageOutput
from rlhf.stages.reward_evidence import (
    HELD_OUT_SCORES,
    MISTAKES_FILE,
    REPORT_FILE,
    rows_of,
    split_names,
    write_quality,
    write_scores,
)
from rlhf.stages.reward_measures import ScoredComparison, scored_responses
from rlhf.statistics.annotations import Resampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BENCHMARK_SCORES = "benchmark_scores.jsonl"
_KEY = "reward_report.reward_model"


@dataclass(frozen=True)
class _Chosen:
    """The comparisons of the wanted splits, each with its split's name."""

    records: Sequence[tuple[str, Comparison]]
    where: str


def run(context: StageContext) -> StageOutput:
    """Scores comparisons and benchmark and writes the report; the ranks share the responses."""
    config, runtime = context.config, context.runtime
    with context.open_tracker(1) as tracker:
        tokenizer = load_tokenizer(context.inputs["reward_model"], config.model, key=_KEY)
        chosen = _comparisons(context, tokenizer, tracker)
        benchmark = _benchmark(context, tokenizer)
        texts: list[tuple[PromptContent, str]] = []
        for _, record in chosen.records if chosen else []:
            texts += [(record.prompt, record.chosen), (record.prompt, record.rejected)]
        for row in benchmark:
            texts += [(row.prompt, response) for response in (*row.chosen, *row.rejected)]
        scores = scored_responses(context, context.inputs["reward_model"], texts, key=_KEY)
        num = 2 * len(chosen.records) if chosen else 0
        summary: dict[str, Any] = {}
        if runtime.is_main:
            summary = _write(context, tokenizer, chosen, scores[:num], benchmark, scores[num:])
        numbers = {name: value["value"] if isinstance(value, dict) else value for name, value in summary.items()}
        tracker.log(1, {f"reward_report/{name}": float(value) for name, value in numbers.items()})
    runtime.barrier()
    names = [REPORT_FILE, HELD_OUT_SCORES, MISTAKES_FILE, BENCHMARK_SCORES]
    return StageOutput(summary, [name for name in names if (context.stage.path / name).exists()])


def _comparisons(context: StageContext, tokenizer: PreTrainedTokenizerBase, tracker: Tracker) -> _Chosen | None:
    """Those of the given folder, else the data's own within its limits of length; None where there is a benchmark only.

    Raises `DataError` when the wanted splits have none.
    """
    section, data = context.config.reward_report, context.config.data
    folder = context.inputs.get("comparisons")
    if folder is None and not gives_comparisons(data):
        return None
    splits = comparisons_of(context, tokenizer)
    splits.report(tracker.message)
    found = [(name, record) for name in split_names(section.splits) for record in splits.named(name)]
    if not found:
        counts = ", ".join(f"{name} has {len(splits.named(name))}" for name in split_names(("train", *section.splits)))
        raise DataError(
            f"there is no comparison to report on in {folder or 'the data'}: reward_report.splits="
            f"[{','.join(section.splits)}] and {counts}. Choose other splits"
        )
    return _Chosen(found[: section.max_comparisons], folder or f"data {data.type}")


def _benchmark(context: StageContext, tokenizer: PreTrainedTokenizerBase) -> list[BenchmarkRow]:
    path, as_chat = context.inputs.get("benchmark"), context.config.reward_report.benchmark_as_chat
    if path is None:
        return []
    rows = read_benchmark(path)
    if as_chat is None:
        as_chat = bool(tokenizer.chat_template)
    return [row.as_chat() for row in rows] if as_chat else rows


MemberScores = tuple[float, ...]


def _write(
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    chosen: _Chosen | None,
    pair_scores: list[MemberScores | None],
    benchmark: list[BenchmarkRow],
    benchmark_scores: list[MemberScores | None],
) -> dict[str, Any]:
    """Writes all files; returns the summary."""
    section, folder = context.config.reward_report, context.stage.path
    resampling = Resampling(section.confidence, section.bootstrap_resamples, context.config.seed)
    report: dict[str, Any] = {"schema": SCHEMA, "reward_model": context.inputs["reward_model"]}
    shown: list[Exhibits] = []
    summary: dict[str, Any] = {}
    if chosen is not None:
        settings = QualitySettings(resampling, section.num_bins, section.num_mistakes)
        found, exhibits, own = _report_comparisons(context, tokenizer, chosen, pair_scores, settings)
        report |= found
        shown.append(exhibits)
        summary |= own
    if benchmark:
        scored = _row_scores(benchmark, benchmark_scores)
        found = benchmark_report(benchmark, scored, resampling)
        report["benchmark"] = {"file": context.inputs["benchmark"], **found}
        shown.append(benchmark_exhibits(found, Path(context.inputs["benchmark"]).name))
        lines = [
            {"subset": row.subset, **row.columns, "scores": None if one is None else one}
            for row, one in zip(benchmark, scored, strict=True)
        ]
        write_text(folder / BENCHMARK_SCORES, "".join(dump_json(line) + "\n" for line in lines))
        summary |= {name: found[name] for name in ("total",) if "value" in found[name]}
        summary["num_benchmark_rows"] = len(benchmark)
    write_json(folder / REPORT_FILE, report)
    Exhibits(
        tuple(table for one in shown for table in one.tables), tuple(figure for one in shown for figure in one.figures)
    ).write(folder)
    return summary


def _report_comparisons(
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    chosen: _Chosen,
    scores: list[MemberScores | None],
    settings: QualitySettings,
) -> tuple[dict[str, Any], Exhibits, dict[str, Any]]:
    """The report's numbers, what is shown of them, and the summary. Raises `DataError` when nothing could be scored."""
    by_split: dict[str, list[ScoredComparison]] = {}
    scored: list[ScoredComparison] = []
    for number, (split, record) in enumerate(chosen.records):
        first, second = scores[2 * number], scores[2 * number + 1]
        if first is not None and second is not None:
            scored.append(ScoredComparison(record, first, second))
            by_split.setdefault(split, []).append(scored[-1])
    num_too_long = len(chosen.records) - len(scored)
    if not scored:
        raise DataError(
            f"all {num_too_long} comparisons of {chosen.where} are too long for the positions of "
            f"{context.inputs['reward_model']}"
        )
    lengths = [
        tuple(len(encode_pair(tokenizer, row.prompt, text).response_ids) for text in (row.chosen, row.rejected))
        for row in (one.comparison for one in scored)
    ]
    rows = rows_of(scored, [(one, other) for one, other in lengths])
    about = {
        "measured_on": {
            "what": chosen.where,
            "splits": split_names(context.config.reward_report.splits),
            "num_too_long": num_too_long,
        }
    }
    write_scores(context.stage.path / HELD_OUT_SCORES, by_split)
    report, exhibits = write_quality(context.stage.path, rows, "Reward report", about, settings)
    named = {"accuracy": report["accuracy"], "margin": report["margin"], "ece": report["calibration"]["ece"]}
    summary = {name: value for name, value in named.items() if "value" in value}
    return report, exhibits, {**summary, "num_comparisons": len(scored), "num_too_long": num_too_long}


def _row_scores(rows: list[BenchmarkRow], scores: list[MemberScores | None]) -> list[RowScores | None]:
    """The members' mean scores of each row's chosen and rejected responses; None where one is too long."""
    found: list[RowScores | None] = []
    place = 0
    for row in rows:
        own = scores[place : place + len(row.chosen) + len(row.rejected)]
        place += len(own)
        means = [sum(one) / len(one) for one in own if one is not None]
        whole = len(means) == len(own)
        found.append((means[: len(row.chosen)], means[len(row.chosen) :]) if whole else None)
    return found
