"""Several reward models that score together: whole models side by side, or adapters and heads on one base in memory.

The folder of an ensemble holds `rlhf_ensemble.json`, which lists its members, and their folders, each of which plain
transformers or PEFT loads by itself.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlhf.errors import ArtifactError
from rlhf.models.adapters import check_scorer, head_weight, inject_adapter, lora_settings, lora_weights
from rlhf.models.loading import check_no_missing_weights, load_tokenizer
from rlhf.models.paths import ENSEMBLE_FILE, base_of, check_model_path, is_adapter, member_folders
from rlhf.models.scalar import (
    HEADS,
    ScalarModel,
    load_classifier,
    response_scores,
    sequence_scores,
    use_pad_token,
)
from rlhf.ops.sequences import position_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.config.model import ModelConfig

MEMBERS = "members"


class ScalarEnsemble(nn.Module, ABC):
    """The members of an ensemble, in the order of its list. `load` makes the kind that fits the folder."""

    num_members: int
    encoder_decoder: bool

    @abstractmethod
    def member_scores(self, input_ids: Tensor, attention_mask: Tensor, num_prompt: int | None) -> Tensor:
        """The scores (M, B) float32 of B responses by each of M members; the arguments are `response_scores`'s."""

    @staticmethod
    def load(
        path: str | Path,
        config: ModelConfig | None = None,
        dtype: torch.dtype = torch.float32,
        key: str = "ppo.reward_model",
    ) -> ScalarEnsemble:
        """The ensemble in folder `path`, in evaluation mode. Raises `ArtifactError` for members of two kinds."""
        check_model_path(str(path), key)
        folders = member_folders(path, key)
        kinds = {is_adapter(folder) for folder in folders}
        if len(kinds) > 1:
            raise ArtifactError(f"{key}: some members of {path} are adapters and some whole models; save it again")
        kind = AdapterEnsemble if kinds == {True} else ModelEnsemble
        ensemble = kind.of_members(folders, config, dtype, key)
        ensemble.eval()
        return ensemble


class ModelEnsemble(ScalarEnsemble):
    """Whole models."""

    def __init__(self, members: Sequence[ScalarModel]) -> None:
        super().__init__()
        self.num_members = len(members)
        self.encoder_decoder = members[0].encoder_decoder
        # Not in a module list: what shards a model takes the items of the outermost list for its layers.
        for number, member in enumerate(members):
            self.add_module(f"member_{number}", member)

    @classmethod
    def of_members(cls, folders: Sequence[str], config: ModelConfig | None, dtype: torch.dtype, key: str) -> Self:
        """Loads the members."""
        return cls([ScalarModel.load(folder, config, dtype, key) for folder in folders])

    def member_scores(self, input_ids: Tensor, attention_mask: Tensor, num_prompt: int | None) -> Tensor:
        """See `ScalarEnsemble.member_scores`."""
        members = [cast(ScalarModel, self.get_submodule(f"member_{number}")) for number in range(self.num_members)]
        return torch.stack([response_scores(member, input_ids, attention_mask, num_prompt) for member in members])


class AdapterEnsemble(ScalarEnsemble):
    """Adapters on one causal base, each with a head of its own; the base is in memory once."""

    def __init__(self, model: PreTrainedModel, heads: Sequence[Tensor]) -> None:
        """`model` has the adapters `member_0`, `member_1`, ... in its layers; `heads` are their weights (1, H)."""
        super().__init__()
        self.num_members = len(heads)
        self.encoder_decoder = False
        self.model = model
        for number, weight in enumerate(heads):
            head = nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype)
            head.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(f"head_{number}", head)
        self._layers = tuple(module for module in model.modules() if isinstance(module, LoraLayer))

    @classmethod
    def of_members(cls, folders: Sequence[str], config: ModelConfig | None, dtype: torch.dtype, key: str) -> Self:
        """Loads the base once and puts the members' adapters into it."""
        bases = {base_of(folder, key) for folder in folders}
        if len(bases) > 1:
            raise ArtifactError(f"{key}: the members are adapters on several bases: {', '.join(sorted(bases))}")
        base = bases.pop()
        with torch.random.fork_rng():  # a new classifier's head and new matrices are random before they are loaded
            model, missing = load_classifier(base, config, dtype, key)
            check_no_missing_weights([name for name in missing if not name.startswith(HEADS)], base, key)
            use_pad_token(model, load_tokenizer(folders[0], config, key).pad_token_id)
            # The head of the classifier itself is nobody's.
            cast(Any, model).score = nn.Identity()
            heads = []
            for number, folder in enumerate(folders):
                check_scorer(folder, key)
                try:
                    inject_adapter(model, lora_settings(folder, key), f"member_{number}", lora_weights(folder, key))
                except ValueError as error:
                    raise ArtifactError(f"{key}: the adapter in {folder} does not fit its base: {error}") from error
                heads.append(head_weight(folder, key))
        return cls(model, heads)

    def member_scores(self, input_ids: Tensor, attention_mask: Tensor, num_prompt: int | None) -> Tensor:
        """See `ScalarEnsemble.member_scores`."""
        if attention_mask.dtype != torch.bool:
            raise ValueError(f"attention_mask must be bool, not {attention_mask.dtype}")
        backbone: nn.Module = getattr(self.model, self.model.base_model_prefix)
        scores = []
        for number in range(self.num_members):
            for layer in self._layers:
                layer._disable_adapters = False
                layer._active_adapter = [f"member_{number}"]
            states = backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids(attention_mask),
                use_cache=False,
            ).last_hidden_state
            head = cast(nn.Linear, self.get_submodule(f"head_{number}"))
            scores.append(sequence_scores(head(states.to(head.weight.dtype)).squeeze(-1).float(), attention_mask))
        return torch.stack(scores)


def write_members(folder: Path, num_members: int) -> None:
    """Writes the list of an ensemble's members, which lie in `members/0`, `members/1`, ... of the folder."""
    names = [f"{MEMBERS}/{number}" for number in range(num_members)]
    (folder / ENSEMBLE_FILE).write_text(json.dumps({"members": names}, indent=2) + "\n", encoding="utf-8")
