"""TRL's `DPOTrainer` on examples that are token ids already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl.trainer.dpo_trainer import DPOTrainer

if TYPE_CHECKING:
    from datasets import Dataset


class PreparedDPOTrainer(DPOTrainer):
    """Takes the columns `prompt_ids`, `chosen_ids` and `rejected_ids` as they are.

    TRL's own preparation starts from texts: it would end responses once more and tokenise prompt and response together,
    which gives other ids than sampling and scoring see.
    """

    def _prepare_dataset(self, dataset: Dataset, *arguments: Any, **keywords: Any) -> Dataset:
        return dataset
