"""One function for each kind of record; the config's type decides where the records come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, assert_never

from rlhf.config.data import (
    DataConfig,
    EmbeddedData,
    FileData,
    HubData,
    Kind,
    LabelledTextData,
    PartsData,
    SourceConfig,
    source_of,
)
from rlhf.data import labelled_text
from rlhf.data.files import check_files, check_labelled_files, hash_files, load_files
from rlhf.data.hub import check_hub, hash_hub, load_hub
from rlhf.data.parts import HeldOut, naming_the_part, require_source, without_leaks
from rlhf.data.splits import Splits
from rlhf.errors import ConfigError
from rlhf.records import Comparison, Demonstration, Prompt, PromptContent, RatedResponse, RecordT

# Raised when the same files and config would give other records than before, so that finished stages run again.
LOADER_VERSION = 2


def load_prompts(config: DataConfig) -> Splits[Prompt]:
    """Distinct prompts by split. Raises `ConfigError` when the data cannot give them, `DataError` for broken rows."""
    if isinstance(config, PartsData):
        source = require_source(config, "prompts")
        with naming_the_part(config, source):
            return load_prompts(source)
    match config:
        case EmbeddedData():
            from rlhf.data import embedded

            made = embedded.prompts(config)
            return Splits(list(made.train), list(made.validation), list(made.test))
        case FileData():
            return load_files(config, Prompt)
        case HubData():
            return load_hub(config, Prompt)
        case LabelledTextData():
            return labelled_text.load_prompts(config)
        case _:
            assert_never(config)


def load_demonstrations(config: DataConfig) -> Splits[Demonstration]:
    """Demonstrations by split; those of comparisons are the chosen responses. Errors as in `load_prompts`."""
    if isinstance(config, PartsData):
        source = require_source(config, "demonstrations")
        with naming_the_part(config, source):
            demonstrations = load_demonstrations(source)
        return _apart_from_prompts(config, demonstrations, source, "demonstrations")
    match config:
        case EmbeddedData():
            from rlhf.data import embedded

            made = embedded.demonstrations(config)
            return Splits(list(made.train), list(made.validation), list(made.test))
        case FileData():
            return load_files(config, Demonstration)
        case HubData():
            return load_hub(config, Demonstration)
        case LabelledTextData():
            return labelled_text.load_demonstrations(config)
        case _:
            assert_never(config)


def load_comparisons(config: DataConfig) -> Splits[Comparison]:
    """The data's own comparisons by split. Errors as in `load_prompts`."""
    if isinstance(config, PartsData):
        source = require_source(config, "comparisons")
        with naming_the_part(config, source):
            comparisons = load_comparisons(source)
        return _apart_from_prompts(config, comparisons, source, "comparisons")
    match config:
        case EmbeddedData():
            raise ConfigError(
                "data.type=embedded gives prompts and demonstrations; its comparisons come from the collect stage. Put "
                "collect in stages, or name a folder of comparisons with reward_model.comparisons"
            )
        case FileData():
            return load_files(config, Comparison)
        case HubData():
            return load_hub(config, Comparison)
        case LabelledTextData():
            return labelled_text.load_comparisons(config)
        case _:
            assert_never(config)


def load_ratings(config: DataConfig) -> Splits[RatedResponse]:
    """The data's own rated responses by split. Errors as in `load_prompts`."""
    if isinstance(config, PartsData):
        return load_ratings(require_source(config, "ratings"))
    match config:
        case FileData():
            return load_files(config, RatedResponse)
        case HubData():
            return load_hub(config, RatedResponse)
        case EmbeddedData() | LabelledTextData():
            raise ConfigError(
                f"data.type={config.type} has no rated responses: reward_model.loss.type=rating needs rows of prompt, "
                "response and rating (data=files or data=hub), or a folder of them in reward_model.ratings"
            )
        case _:
            assert_never(config)


def gives_comparisons(config: DataConfig) -> bool:
    """Whether the source may hold comparisons of its own; for files and hub only reading the rows can tell."""
    source = source_of(config, "comparisons")
    return source is not None and not isinstance(source, EmbeddedData)


def _apart_from_prompts(
    config: PartsData, splits: Splits[RecordT], source: SourceConfig, kind: Kind
) -> Splits[RecordT]:
    """Records of one part without the prompts that another part holds out longer."""
    prompts = require_source(config, "prompts")
    if prompts == source:
        return splits  # one source divides all its records alike
    return without_leaks(splits, HeldOut.of(load_prompts(config)), source, kind)


def settings_of(config: DataConfig) -> dict[str, Any]:
    """The section as plain values without where the data lies: what decides, besides its content, what is read."""
    if isinstance(config, PartsData):
        return {"type": config.type} | {name: settings_of(source) for name, source in config.sources().items()}
    return config.model_dump(mode="json", exclude={"path"})


def data_content(config: DataConfig) -> str:
    """What identifies the content, whatever the settings: the hash of the files' bytes.

    For the embedded corpus the version of its generator, and which of its files were edited; for the hub the id,
    configuration and revision, so a branch that moves is not noticed: give a commit as data.revision.
    """
    match config:
        case EmbeddedData():
            from rlhf.data import embedded
            from rlhf.data.embedded.edits import edited_files

            edited = [f"{name} {digest}" for name, digest in edited_files().items()]
            return f"embedded {embedded.CORPUS_VERSION}" + (f", edited: {', '.join(edited)}" if edited else "")
        case HubData():
            return hash_hub(config)
        case LabelledTextData(from_hub=True):
            return hash_hub(labelled_text.hub_source(config))
        case FileData() | LabelledTextData():
            return hash_files(config.path)
        case PartsData():
            return " ".join(f"{name} {data_content(source)}" for name, source in config.sources().items())
        case _:
            assert_never(config)


def data_hash(config: DataConfig, content: str | None = None) -> str:
    """What identifies the data in a fingerprint: the config without its path, and the content.

    `content` is what `data_content` gave, where that is known already: reading all files takes time.
    """
    content = data_content(config) if content is None else content
    body = json.dumps([LOADER_VERSION, settings_of(config), content], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def training_texts(config: DataConfig) -> Iterator[str]:
    """The training split as strings of prompt and response, in a fixed order: what a new tokenizer is trained on.

    Data with comparisons gives both responses; data with prompts only gives the prompts. A conversation is its turns,
    separated by blank lines.
    """
    if isinstance(config, PartsData):
        for source in dict.fromkeys(config.sources().values()):
            yield from training_texts(source)
        return
    if isinstance(config, LabelledTextData):
        yield from labelled_text.training_strings(config)
        return
    if isinstance(config, EmbeddedData):
        yield from (_joined(entry.prompt, entry.response) for entry in load_demonstrations(config).train)
        yield from (_joined(prompt.prompt, "") for prompt in load_prompts(config).train)
        return
    try:
        pairs = load_comparisons(config).train
    except ConfigError:
        pairs = []
    for pair in pairs:
        yield _joined(pair.prompt, pair.chosen)
        yield _joined(pair.prompt, pair.rejected)
    if pairs:
        return
    try:
        demonstrations = load_demonstrations(config).train
    except ConfigError:
        yield from (_joined(prompt.prompt, "") for prompt in load_prompts(config).train)
        return
    yield from (_joined(entry.prompt, entry.response) for entry in demonstrations)


def _joined(prompt: PromptContent, response: str) -> str:
    if isinstance(prompt, str):
        return prompt + response
    turns = [message.content for message in prompt]
    return "\n\n".join([*turns, response] if response else turns)


def preflight(config: DataConfig) -> None:
    """Checks in milliseconds that the data is there and looks usable, before anything slow starts.

    Raises `ConfigError` or `DataError`. What only reading all rows can show is found when a stage loads the data.
    """
    match config:
        case EmbeddedData():
            return
        case FileData():
            check_files(config)
        case LabelledTextData(from_hub=True):
            check_hub(labelled_text.hub_source(config))
        case LabelledTextData():
            check_labelled_files(config)
        case HubData():
            check_hub(config)
        case PartsData():
            if not config.sources():
                raise ConfigError(
                    "data.type=parts names no source: set data.demonstrations.type=files, say, and its path"
                )
            for source in config.sources().values():
                with naming_the_part(config, source):
                    preflight(source)
        case _:
            assert_never(config)
