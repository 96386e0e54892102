"""`data`: where prompts, demonstrations and comparisons come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import NonNegativeInt, PositiveInt, Probability, Section

RowFormat = Literal[
    "auto", "prompt_response", "rating", "messages", "preference", "hh", "input_output", "contents", "text"
]


class SplitConfig(Section):
    """Shares of the splits. A prompt's hash decides its split, so equal prompts never straddle; the rest is train."""

    validation: Probability = Field(0.05, description="share of the prompts held out while training")
    test: Probability = Field(0.05, description="share of the prompts for the final evaluation")
    salt: str = Field("rlhf", description="change it to draw other splits")

    @model_validator(mode="after")
    def _shares_leave_training_data(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must stay below 1: nothing would be left to train on")
        return self


class _DataSection(Section):
    max_prompt_tokens: PositiveInt = Field(64, description="longest prompt; a longer one is an over-long row")
    max_response_tokens: PositiveInt = Field(64, description="longest response in data, EOS included")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="broken rows (wrong type, empty, over-long, not UTF-8): stop, or report, count and skip"
    )


class EmbeddedData(_DataSection):
    """The embedded corpus: short reviews from a grammar, with attributes whose truth is known."""

    type: Literal["embedded"] = "embedded"
    num_demonstrations: PositiveInt = Field(6000, description="demonstrations of mixed quality, all splits together")
    num_prompts: PositiveInt = Field(6000, description="distinct prompts for collection and PPO in the training split")
    num_test_prompts: PositiveInt = Field(500, description="held-out prompts in the test split")
    num_validation_prompts: PositiveInt = Field(200, description="held-out prompts in the validation split")
    corpus_seed: NonNegativeInt = Field(0, description="seed of the texts; the run's seed does not change the corpus")


class FileData(_DataSection):
    """JSONL, CSV or Parquet files in any of the formats that `rlhf.data.formats` knows."""

    type: Literal["files"] = "files"
    path: str = Field(description="a file, or a folder with train/validation/test files")
    format: RowFormat = Field("auto", description="row format; auto tells it from the keys of the first row")
    splits: SplitConfig = Field(SplitConfig(), description="used where the folder has no file for a split")


class HubData(_DataSection):
    """A `datasets` data set: a hub id, or a folder that `datasets` saved."""

    type: Literal["hub"] = "hub"
    path: str = Field(description="hub id such as Anthropic/hh-rlhf, or a folder written by save_to_disk")
    name: str | None = Field(None, description="configuration of the data set")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    format: RowFormat = Field("auto", description="row format; auto tells it from the keys of the first row")
    splits: SplitConfig = Field(SplitConfig(), description="used where the data set has no such split")


class LabelledTextData(_DataSection):
    """Texts with a class label: continuations of their first words, pairs of a preferred against another class."""

    type: Literal["labelled_text"] = "labelled_text"
    path: str = Field(description="a file, or a folder with train/validation/test files")
    text_field: str = Field("text", description="column of the text")
    label_field: str = Field("label", description="column of the label")
    preferred_label: str = Field("positive", description="label whose texts are the chosen side of a pair")
    prompt_words: PositiveInt = Field(4, description="leading words of a text that become the prompt")
    judge_share: Probability = Field(
        0.5, description="share of the training texts kept for an independent judge; no other stage sees them"
    )
    num_comparisons: PositiveInt = Field(8000, description="training pairs drawn from the labels")
    splits: SplitConfig = Field(SplitConfig(), description="used where the folder has no file for a split")


DataConfig = Annotated[EmbeddedData | FileData | HubData | LabelledTextData, Field(discriminator="type")]
