"""What must hold for a model of numbers whatever is below its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.models import ScalarModel, save_model


def check_head_follows_from_its_seed(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """From a folder or the model itself, whatever the global stream, which stays as it was."""
    save_model(model, tokenizer, folder)
    torch.manual_seed(21)
    state = torch.random.get_rng_state()
    first = ScalarModel.from_policy(folder, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(22)
    second = ScalarModel.from_policy(model, seed=7)
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(ScalarModel.from_policy(model, seed=8).head.weight, first.head.weight)
