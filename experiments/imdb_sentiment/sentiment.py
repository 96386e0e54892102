"""The reward of the sentiment frontier: how positive a classifier of the hub, or a folder, finds a text."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

POSITIVE = "positive"
BATCH = 64


@cache
def _loaded(model: str) -> tuple[Any, Any, torch.device, int]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = AutoModelForSequenceClassification.from_pretrained(model).to(device).eval()
    labels = {name.lower(): int(number) for number, name in classifier.config.id2label.items()}
    return classifier, AutoTokenizer.from_pretrained(model), device, labels[POSITIVE]


@torch.inference_mode()
def positive_probability(prompts: list[str], completions: list[str], model: str) -> list[float]:
    """The probability of the label "positive" of each prompt with its response; `model` is a hub id or a folder."""
    classifier, tokenizer, device, positive = _loaded(model)
    texts = [prompt + response for prompt, response in zip(prompts, completions, strict=True)]
    found: list[float] = []
    for start in range(0, len(texts), BATCH):
        rows = tokenizer(texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt").to(device)
        found += classifier(**rows).logits.softmax(-1)[:, positive].tolist()
    return found
