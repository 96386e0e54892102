"""`data`: where prompts, demonstrations and comparisons come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import NonNegativeInt, PositiveInt, Probability, Section

RowFormat = Literal[
    "auto",
    "prompt_response",
    "rating",
    "messages",
    "preference",
    "hh",
    "input_output",
    "contents",
    "text",
    "query_responses",
    "summaries",
    "post_summary",
    "instruction",
    "best_of",
]
# What a stage asks a source for.
Kind = Literal["demonstrations", "comparisons", "prompts", "ratings"]


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
    decode_with: str | None = Field(
        None, description="hub id or folder of the tokenizer that wrote token ids which stand for texts in the rows"
    )
    splits: SplitConfig = Field(SplitConfig(), description="used where the folder has no file for a split")


class HubData(_DataSection):
    """A `datasets` data set: a hub id, or a folder that `datasets` saved."""

    type: Literal["hub"] = "hub"
    path: str = Field(description="hub id such as Anthropic/hh-rlhf, or a folder written by save_to_disk")
    name: str | None = Field(None, description="configuration of the data set")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    split: str | None = Field(None, description="take this split of the data set alone, and divide it; null: all")
    format: RowFormat = Field("auto", description="row format; auto tells it from the keys of the first row")
    decode_with: str | None = Field(
        None, description="hub id or folder of the tokenizer that wrote token ids which stand for texts in the rows"
    )
    splits: SplitConfig = Field(SplitConfig(), description="used where the data set has no such split")


class LabelledTextData(_DataSection):
    """Texts with a class label: continuations of their first words, pairs of a preferred against another class."""

    type: Literal["labelled_text"] = "labelled_text"
    path: str = Field(description="a file, a folder with train/validation/test files, or see from_hub")
    from_hub: bool = Field(False, description="path is a hub id such as stanfordnlp/imdb, or what save_to_disk wrote")
    name: str | None = Field(None, description="configuration of the data set, with from_hub")
    revision: str | None = Field(None, description="branch, tag or commit on the hub, with from_hub")
    text_field: str = Field("text", description="column of the text")
    label_field: str = Field("label", description="column of the label")
    preferred_label: str = Field("positive", description="label whose texts are the chosen side of a pair")
    prompt_words: PositiveInt = Field(4, description="leading words of a text that become the prompt")
    judge_share: Probability = Field(
        0.5, description="share of the training texts kept for an independent judge; no other stage sees them"
    )
    num_comparisons: PositiveInt = Field(8000, description="training pairs drawn from the labels")
    splits: SplitConfig = Field(SplitConfig(), description="used where the folder has no file for a split")


SourceConfig = EmbeddedData | FileData | HubData | LabelledTextData


class NoData(Section):
    """No source of its own."""

    type: Literal["none"] = "none"


PartConfig = Annotated[NoData | SourceConfig, Field(discriminator="type")]


class PartsData(Section):
    """Demonstrations, comparisons and prompts from data sets of their own."""

    type: Literal["parts"] = "parts"
    demonstrations: PartConfig = Field(
        NoData(), description="texts of SFT; none: the chosen responses of the comparisons"
    )
    comparisons: PartConfig = Field(NoData(), description="pairs of the reward model and DPO; none: there are none")
    prompts: PartConfig = Field(NoData(), description="what policies answer; none: the demonstrations' prompts")

    def source(self, kind: Kind) -> SourceConfig | None:
        """Where records of a kind come from; None where no part has them."""
        wanted: dict[Kind, tuple[PartConfig, ...]] = {
            "demonstrations": (self.demonstrations, self.comparisons),
            "comparisons": (self.comparisons,),
            "prompts": (self.prompts, self.demonstrations, self.comparisons),
            "ratings": (),
        }
        return next((part for part in wanted[kind] if not isinstance(part, NoData)), None)

    def sources(self) -> dict[str, SourceConfig]:
        """The parts that have a source, by their key."""
        parts = {"demonstrations": self.demonstrations, "comparisons": self.comparisons, "prompts": self.prompts}
        return {name: part for name, part in parts.items() if not isinstance(part, NoData)}


DataConfig = Annotated[EmbeddedData | FileData | HubData | LabelledTextData | PartsData, Field(discriminator="type")]


def source_of(config: DataConfig, kind: Kind) -> SourceConfig | None:
    """The source of a kind of records: the data itself, or one of its parts; None where no part has them."""
    return config.source(kind) if isinstance(config, PartsData) else config


def paths_of(config: DataConfig) -> list[str]:
    """The files, folders and hub ids that the data is read from, each once."""
    sources = config.sources().values() if isinstance(config, PartsData) else [config]
    return list(dict.fromkeys(source.path for source in sources if not isinstance(source, EmbeddedData)))
