"""`report.html`: one file that shows a run, made from its run folder alone and opening without a network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rlhf.runs import exhibits, results
from rlhf.runs import report_sections as sections
from rlhf.runs.files import write_text
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import dump_json, read_lines
from rlhf.runs.manifest import read_manifest
from rlhf.runs.report_assets import SCRIPT, STYLE
from rlhf.runs.report_mistakes import mistakes

SECTIONS = ("results", "curves", "samples", "stages", "record")


def write_report(run: RunFolder) -> Path:
    """Writes the report of whatever the folder holds so far, atomically, and returns its path.

    Pieces that are missing or cannot be read are left out. Raises `DiskFullError`.
    """
    write_text(run.report, render_report(run))
    return run.report


def render_report(run: RunFolder) -> str:
    """The report as HTML.

    All text of the run is escaped. Should markup slip through nevertheless, the page's content security policy
    lets the browser run no script but ours (by its hash) and load nothing from anywhere.
    """
    manifest = read_manifest(run)
    config = manifest.get("config")
    config = config if isinstance(config, dict) else {}
    title = str(config.get("experiment") or run.path.resolve().name)
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · rlhf report</title><style>{STYLE}</style></head><body><main>"
        f"{_header(run, title, manifest, config)}{_results(run, config)}{_curves(run)}{_samples(run)}"
        f"{_record(run, manifest)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _header(run: RunFolder, title: str, manifest: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    status = str(manifest.get("status") or "unknown")
    code = manifest.get("code")
    commit = code.get("commit") if isinstance(code, dict) else None
    if commit and isinstance(code, dict) and code.get("diff_hash"):
        commit = f"{commit[:10]} with uncommitted changes"
    facts = {
        "run": run.path.resolve().name,
        "seed": manifest.get("seed", config.get("seed")),
        "started": str(manifest.get("started") or "").partition(".")[0].replace("T", " ") or None,
        "time at work": results.format_seconds(manifest["seconds"]) if manifest.get("seconds") else None,
        "config": str(manifest.get("config_hash") or "")[:10] or None,
        "code": commit and str(commit)[:40],
    }
    known = ((escape(name), escape(str(fact))) for name, fact in facts.items() if fact is not None)
    shown = "".join(f"<span>{name} <b>{fact}</b></span>" for name, fact in known)
    links = "".join(f'<a href="#{name}">{name.capitalize()}</a>' for name in SECTIONS)
    return (
        f'<header><h1>{escape(title)} <span class="chip {escape(status, quote=True)}">{escape(status)}</span></h1>'
        f'<div class="meta">{shown}</div><nav>{links}</nav></header>'
    )


def _results(run: RunFolder, config: Mapping[str, Any]) -> str:
    result = run.stage("evaluate").read_result()
    rows = results.comparisons(result.summary) if result else []
    evaluate = config.get("evaluate")
    confidence = evaluate.get("confidence") if isinstance(evaluate, dict) else None
    table = sections.evaluation_table(rows, confidence if isinstance(confidence, float) else None)
    count = results.estimate(result.summary.get("num_prompts")) if result else None
    size = f" on {count.value:,.0f} held-out prompts" if count else ""
    fold = f"<h3>Before and after{size}</h3>{table}" if table else ""
    study = run.stage("closed_form").read_result()
    gaps = sections.gap_table(results.gap_rows(study.summary)) if study else ""
    shown = "".join(
        exhibits.to_html(found)
        for folder in sorted(run.stages.glob(f"*/{exhibits.EXHIBITS_FILE}"))
        if (found := exhibits.Exhibits.read(folder.parent)) is not None
    )
    headline = "" if (gaps or shown) and not rows else sections.headline(rows)
    return f'<section id="results"><h2>Results</h2>{headline}{fold}{gaps}{shown}{mistakes(run)}</section>'


def _curves(run: RunFolder) -> str:
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for entry in read_lines(run.metrics):
        if isinstance(entry.get("stage"), str) and isinstance(entry.get("step"), int):
            by_stage.setdefault(entry["stage"], []).append(entry)
    body = "".join(sections.curves(stage, entries) for stage, entries in by_stage.items())
    return f'<section id="curves"><h2>Curves</h2>{body or "<p class=dim>Nothing was logged yet.</p>"}</section>'


def _samples(run: RunFolder) -> str:
    entries = list(read_lines(run.samples))
    pairs = [entry for entry in entries if entry.get("stage") == "evaluate"]
    rollouts = [entry for entry in entries if entry.get("stage") == "ppo"]
    body = f"{sections.samples(pairs)}{sections.rollouts(rollouts)}"
    return f'<section id="samples"><h2>Samples before and after</h2>{body}</section>'


def _record(run: RunFolder, manifest: Mapping[str, Any]) -> str:
    try:
        config = run.config.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        config = ""
    # The config has a fold of its own.
    rest = {name: value for name, value in manifest.items() if name != "config"}
    folds = sections.fold("Resolved config", config) if config else ""
    folds += sections.fold("Manifest", dump_json(rest, indent=2)) if rest else ""
    return (
        f'<section id="stages"><h2>Stages</h2>{sections.stage_table(results.stage_rows(run))}</section>'
        f'<section id="record"><h2>Record</h2>{folds or "<p class=dim>No manifest and no config.</p>"}</section>'
    )
