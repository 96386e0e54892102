"""The loss of held-out demonstrations, as stage evaluate reports it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.data import load_demonstrations
from rlhf.data.tokenization import encode_pair
from rlhf.errors import DataError
from rlhf.models.scratch import build_from_scratch
from rlhf.stages.context import StageContext
from rlhf.stages.demonstration_loss import held_out_loss, row_sums
from tests.stage_example import make_context, tiny_config, write_demonstrations

TEXTS = [f"the test film {number} was good bad fine great poor" for number in range(9)]


def context_of(folder: Path, **evaluate: Any) -> StageContext:
    config = tiny_config(folder, evaluate={"sampling": {"batch_size": 3}, **evaluate})
    return make_context(config, folder / "run", "evaluate")


def test_it_is_the_mean_over_all_response_tokens(tmp_path: Path) -> None:
    """Against each demonstration by itself, unpadded; responses have one to five words, so a mean of means differs."""
    write_demonstrations(tmp_path / "data")
    context = context_of(tmp_path, num_demonstrations=7)
    model, tokenizer = build_from_scratch(context.config.model.scratch, TEXTS, seed=1)
    rows = load_demonstrations(context.config.data).test
    assert len(rows) == 7
    nats, counts = [], []
    for row in rows:
        pair = encode_pair(tokenizer, row.prompt, row.response)
        with torch.no_grad():
            logits = model(torch.tensor([pair.prompt_ids + pair.response_ids])).logits[0].double()
        places = range(len(pair.prompt_ids) - 1, len(pair.prompt_ids) + len(pair.response_ids) - 1)
        chosen = [
            float(logits[place].log_softmax(-1)[token]) for place, token in zip(places, pair.response_ids, strict=True)
        ]
        nats.append(-sum(chosen))
        counts.append(len(chosen))
    found = held_out_loss(context, model, tokenizer)
    assert found.value == pytest.approx(sum(nats) / sum(counts), rel=1e-5)
    assert found.low < found.value < found.high
    pairs = [encode_pair(tokenizer, row.prompt, row.response) for row in rows]
    sums = row_sums(model, pairs, int(tokenizer.pad_token_id), torch.device("cpu"))
    assert sums[:, 0].tolist() == pytest.approx(nats, rel=1e-5)
    assert sums[:, 2].tolist() == counts
    fewer = held_out_loss(context_of(tmp_path, num_demonstrations=2), model, tokenizer)
    assert fewer.value == pytest.approx(sum(nats[:2]) / sum(counts[:2]), rel=1e-5)


def test_data_that_holds_nothing_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"prompt": f"the film {number}", "response": " was good"}) for number in range(4)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows) + "\n")
    nothing = {"splits": {"validation": 0.0, "test": 0.0}}
    config = tiny_config(tmp_path, data=nothing, evaluate={"num_demonstrations": 2})
    context = make_context(config, tmp_path / "run", "evaluate")
    model, tokenizer = build_from_scratch(config.model.scratch, TEXTS, seed=1)
    with pytest.raises(DataError, match="no held-out demonstration"):
        held_out_loss(context, model, tokenizer)
