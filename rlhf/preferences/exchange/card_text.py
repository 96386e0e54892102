"""The dataset card as a page: the front matter of Hugging Face's dataset cards, then the numbers of `card.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def render_card(card: Mapping[str, Any], files: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """Markdown. `files` names the files by configuration (`comparisons`, `ratings`) and split, if there are any."""
    parts = [
        _front_matter(card, files or {}),
        "# Preference data",
        "Exported from a preference store of `rlhf`. All numbers are also in `card.json`. Intervals are 95 %.",
        "## Splits",
        _splits(card),
        "## How labels became comparisons",
        _resolution(card),
        "## Labels",
        _labels(card),
        "## Annotators",
        _annotators(card),
        "## Agreement",
        _agreement(card),
        "## Bias",
        _bias(card),
        "## Responses",
        _responses(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def figure_text(figure: Mapping[str, Any], *, percent: bool = False) -> str:
    """`0.71 [0.65, 0.77]`, as a percentage, or why it is not defined."""
    if "not_defined" in figure:
        return f"not defined: {figure['not_defined']}"
    scale, form, unit = (100, ".1f", " %") if percent else (1, ".3f", "")
    value, low, high = (figure.get(name) for name in ("value", "low", "high"))
    ends = "" if low is None or high is None else f" [{low * scale:{form}}, {high * scale:{form}}]"
    return f"{(value or 0) * scale:{form}}{unit}{ends}"


def _front_matter(card: Mapping[str, Any], files: Mapping[str, Mapping[str, str]]) -> str:
    number = sum(split["num_comparisons"] + split["num_ratings"] for split in card["splits"].values())
    size = next((name for limit, name in _SIZES if number < limit), "n>1M")
    lines = ["---", "pretty_name: Preference data", "tags:", "- preference", "- rlhf", "size_categories:", f"- {size}"]
    if files:
        lines.append("configs:")
        for name, paths in files.items():
            lines += [f"- config_name: {name}", "  data_files:"]
            for split, path in paths.items():
                lines += [f"  - split: {split}", f"    path: {json.dumps(path)}"]
    return "\n".join([*lines, "---"])


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    # Names are what people typed: they neither end a cell nor become HTML.
    cells = [[" ".join(str(cell).split()).replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} × {name}" for name, count in counts.items()) or "none"


def _splits(card: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            f"{one['num_prompts']:,}",
            f"{one['num_comparisons']:,}",
            f"{one['num_ties']:,}",
            f"{one['num_ratings']:,}",
            f"`{one['comparisons_sha256'][:16]}`",
        )
        for name, one in card["splits"].items()
    ]
    settings = card["split_settings"]
    rule = card["split_rule"]
    if settings is not None:
        rule = (
            f"The hash of a prompt decides its split: validation {settings['validation']:g}, test "
            f"{settings['test']:g}, salt `{settings['salt']}`"
        )
    table = _table(["split", "prompts", "comparisons", "of them ties", "ratings", "content (SHA-256)"], rows)
    return (
        f"{table}\n\n{rule}. So no prompt straddles. Seed of the store, which order and sides are drawn from: "
        f"{card['store_seed']}."
    )


def _resolution(card: Mapping[str, Any]) -> str:
    one = card["resolution"]
    lines = [
        f"- Rule: {one['rule']}.",
        f"- {one['num_labels']:,} labels of {one['num_pairs']:,} pairs gave {one['num_comparisons']:,} comparisons.",
        f"- Pairs left out: {_counts(one['pairs_left_out'])}. Labels left out: {_counts(one['labels_left_out'])}.",
        "- `probability` is how likely `chosen` is the better one; a tie has 0.5, and then `chosen` is either.",
        "- `agreement` is the share of the labels behind the outcome.",
        "- A ranking gives all its pairs. Ratings are averaged, but with the rule `all` each is kept.",
    ]
    if card["left_out"]:
        lines.append(f"- Left out besides: {_counts(card['left_out'])}.")
    if card.get("not_written"):
        lines.append(f"- Not written, since the format cannot hold them: {_counts(card['not_written'])}.")
    return "\n".join(lines)


def _labels(card: Mapping[str, Any]) -> str:
    tasks = ", ".join(f"{count:,} {kind}" for kind, count in card["tasks"].items()) or "none"
    lines = [f"Tasks: {tasks}. Rounds: {_rounds(card)}.", _table(["label", "number"], card["labels"].items())]
    lines.append(f"Flags: {_counts(card['flags'])}.")
    return "\n\n".join(lines)


def _rounds(card: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({count:,} tasks)" for name, count in card["rounds"].items()) or "none"


def _annotators(card: Mapping[str, Any]) -> str:
    consistent = card["self_consistency"]
    rows = []
    for name, one in card["annotators"].items():
        pace = "" if one["median_seconds"] is None else f"{one['median_seconds']:.1f} s"
        repeats = consistent.get(name, {}).get("comparisons")
        same = "no repeats" if repeats is None else f"{figure_text(repeats['agreement'], percent=True)}"
        gold = one["gold_right"]
        right = "no gold questions" if not gold["num"] else f"{figure_text(gold, percent=True)} of {gold['num']}"
        counts = (f"{one['num_labels']:,}", f"{one['num_ties']:,}", f"{one['num_skips']:,}")
        rows.append((name, one["kind"], *counts, pace, same, right))
    head = ["annotator", "kind", "labels", "ties", "skips", "median time", "same answer to repeats", "gold right"]
    table = _table(head, rows)
    return f"{table}\n\nLabels of gold questions and blind repeats count here, and nowhere else." if rows else table


def _agreement(card: Mapping[str, Any]) -> str:
    parts = []
    for name, figures in card["agreement"].items():
        if figures.get("not_defined") == "no labels":
            continue
        if "not_defined" in figures:
            parts.append(f"{name.capitalize()}: not defined: {figures['not_defined']}.")
            continue
        rows = [
            ("percent agreement", figure_text(figures["percent_agreement"], percent=True)),
            ("Cohen's kappa, mean of pairs", figure_text(figures["cohen_kappa_mean"])),
            *((f"Cohen's kappa, {pair}", figure_text(one)) for pair, one in figures["cohen_kappa_pairs"].items()),
            ("Fleiss' kappa", figure_text(figures["fleiss_kappa"])),
            ("Krippendorff's alpha", figure_text(figures["krippendorff_alpha"])),
        ]
        count = f"{figures['num_comparable_items']:,} of {figures['num_items']:,}"
        parts.append(f"{name.capitalize()}: {count} items have labels of two annotators or more.")
        parts.append(_table([name, "value"], rows))
    return "\n\n".join(parts) or "Not defined: no labels."


def _bias(card: Mapping[str, Any]) -> str:
    lines = []
    for title, name in (("first side chosen", "position_bias"), ("longer response chosen", "length_bias")):
        one = card[name]
        said = "not known" if not one["num"] else f"{figure_text(one, percent=True)} of {one['num']:,} choices"
        lines.append(f"- {title}: {said}")
    return "\n".join(lines)


def _responses(card: Mapping[str, Any]) -> str:
    rows = [
        (
            f"`{one['policy'][:16]}`" if one["policy"] else "not a policy of ours",
            json.dumps(one["description"], ensure_ascii=False) if one["description"] else "",
            json.dumps(one["sampling"], ensure_ascii=False) if one["sampling"] else "",
            f"{one['num_responses']:,}",
        )
        for one in card["responses"]
    ]
    return _table(["policy", "description", "sampling", "responses"], rows)
