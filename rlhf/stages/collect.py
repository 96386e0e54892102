"""Stage collect: responses from the policy become tasks in the preference store, and their labels comparisons.

Writes `comparisons/{train,validation,test}.jsonl` with a dataset card, and `ratings/` where ratings are asked for.
Where people label, the stage ends by `WaitingForLabels` until their labels are there; what was asked is kept in
`asked.json`, so that the next start finds the same tasks and samples nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from rlhf.config.annotators import RuleAnnotator
from rlhf.config.data import EmbeddedData, SplitConfig, source_of
from rlhf.config.rewards import GoldReward
from rlhf.data import load_prompts
from rlhf.data.embedded import gold_reward
from rlhf.data.splits import SPLITS, SplitName, split_of
from rlhf.errors import WaitingForLabels
from rlhf.models.loading import load_policy, load_tokenizer, place
from rlhf.models.positions import check_positions
from rlhf.preferences.annotators import AnnotatorResources, make_annotators
from rlhf.preferences.asked import FILE, AskedTasks
from rlhf.preferences.exchange.card import make_card
from rlhf.preferences.exchange.card_text import render_card
from rlhf.preferences.exchange.export import ExportedLabels, export_labels
from rlhf.preferences.label_figures import label_figures
from rlhf.preferences.labelling import label_tasks
from rlhf.preferences.resolution import ResolutionRule
from rlhf.preferences.rounds import earlier_tasks
from rlhf.preferences.store import PreferenceStore, TaskKind
from rlhf.preferences.waiting import missing_of_people, store_path, what_to_do
from rlhf.records import Comparison, PromptContent, RatedResponse, content_hash, dump_line, prompt_key
from rlhf.rewards.build import folder_loader
from rlhf.runs.files import write_json, write_text
from rlhf.runs.tracking import Tracker
from rlhf.stages.asking import SPARE_PAIRS, Asker, num_gold_questions
from rlhf.stages.context import StageContext, StageOutput, publish, writing_partial
from rlhf.stages.pool_choice import choose_tasks
from rlhf.stages.response_pool import Asked, Draw, everything, sample_draws
from rlhf.stages.sampling import EncodedPrompt, load_encoded_prompts, require_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Programs label so many tasks before what they said is stored; the other ranks hear as often that rank 0 is at work.
CHUNK_SIZE = 256
# For the dataset card.
SPLIT_RULE = (
    "Each prompt has the split that the data of the run gives it, and one that it does not have, that of its hash"
)


def run(context: StageContext) -> StageOutput:
    """Samples and asks, labels, and exports. Raises `WaitingForLabels` on all ranks while labels of people are missing.

    1. Sample responses, choose what to ask about them, and put it into the store, unless an earlier attempt has.
    2. Programs label what is theirs.
    3. Without the labels of people, this is all for now.
    4. Resolve the labels into comparisons and ratings, and write them.
    """
    config, runtime = context.config, context.runtime
    wanted = _num_tasks(context)
    with context.open_tracker(sum(wanted.values())) as tracker:
        if not runtime.broadcast_object(runtime.is_main and _asked_before(context) is not None):
            _ask(context, wanted, tracker)
        _label(context, tracker)
        problem = runtime.broadcast_object(_lacking(context) if runtime.is_main else None)
        if problem is not None:
            raise WaitingForLabels(problem)
        summary = _export(context, wanted, tracker) if runtime.is_main else {}
        publish(context, "comparisons")
        outputs = ["comparisons"]
        if config.preferences.kind == "rating":
            publish(context, "ratings")
            outputs.append("ratings")
    return StageOutput(summary=summary, outputs=outputs)


def _num_tasks(context: StageContext) -> dict[SplitName, int]:
    section = context.config.collect
    return {
        "train": section.num_comparisons,
        "validation": section.num_validation_comparisons,
        "test": section.num_test_comparisons,
    }


def _open_store(context: StageContext) -> PreferenceStore:
    path = store_path(context.config, context.run.path)
    return PreferenceStore.open_or_create(path, seed=context.config.seed)


def _asked_before(context: StageContext) -> AskedTasks | None:
    """What an earlier attempt has asked; None when there is none, or when the store has lost it."""
    asked = AskedTasks.read(context.stage.path / FILE)
    if asked is None or not store_path(context.config, context.run.path).exists():
        return None
    with _open_store(context) as store:
        there = store.counts(asked.everything)
    return asked if len(there) == len(set(asked.everything)) else None


# --- asking -----------------------------------------------------------------------------------------------------------


def _ask(context: StageContext, wanted: dict[SplitName, int], tracker: Tracker) -> None:
    """Samples, chooses, and puts the tasks into the store; rank 0 writes."""
    config, runtime = context.config, context.runtime
    tokenizer = load_tokenizer(context.inputs["policy"], config.model, key="collect.policy")
    policy = load_policy(context.inputs["policy"], config.model, runtime.dtype, key="collect.policy")
    policy = place(policy, runtime.device)
    prompts = load_encoded_prompts(config.data, tokenizer, tracker.message)
    longest = max(len(prompt.ids) for split in prompts.values() for prompt in split)
    check_positions(policy, longest + config.collect.sampling.max_response_tokens)
    asked: dict[SplitName, list[Asked]] = {}
    for split in SPLITS:
        if wanted[split]:
            require_prompts(prompts[split], split)
        asked[split] = _asked_of_split(context, policy, tokenizer, prompts[split], split, wanted[split])
    spare = _spare_draws(context, policy, tokenizer, prompts["train"], len(asked["train"]))
    if runtime.is_main:
        with _open_store(context) as store:
            found = Asker(context, store).ask(asked, spare)
        write_json(context.stage.path / FILE, found.to_json())
    runtime.barrier()


def _asked_of_split(
    context: StageContext,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EncodedPrompt],
    split: SplitName,
    wanted: int,
) -> list[Asked]:
    """What is asked of one split. Only the training tasks are chosen: a measure must not depend on the choice."""
    section = context.config.preferences
    if split == "train":
        num_draws = ceil(wanted * section.selection.pool_factor)
        draws = sample_draws(context, policy, tokenizer, prompts, num_draws, section.num_responses)
        return choose_tasks(context, policy, tokenizer, draws, wanted)
    kind: TaskKind = "pairwise" if split == "test" and section.gold_labels_test else section.kind
    num_responses = {"pairwise": 2, "ranking": section.num_responses, "rating": 1}[kind]
    return everything(sample_draws(context, policy, tokenizer, prompts, wanted, num_responses), kind)


def _spare_draws(
    context: StageContext,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EncodedPrompt],
    num_tasks: int,
) -> list[Draw]:
    """Pairs that are not asked about otherwise, of which the gold reward makes questions with a known answer."""
    config = context.config
    wanted = num_gold_questions(config.preferences, num_tasks)
    if not wanted or not isinstance(config.data, EmbeddedData):
        return []
    num_draws = ceil(config.collect.num_comparisons * config.preferences.selection.pool_factor)
    num_samples = ceil(num_draws / len(prompts)) * config.preferences.num_responses
    # Behind every sample that a prompt has so far.
    first = len(prompts) * ceil(num_samples / 2)
    return sample_draws(context, policy, tokenizer, prompts, SPARE_PAIRS * wanted, 2, first=first)


# --- labelling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heartbeat:
    """Rank 0 labels alone, perhaps for hours: the others wait in short collective operations, which never time out."""

    beat: Callable[[bool], bool]

    def working(self, *_: int) -> None:
        """Rank 0 says that it is at work."""
        self.beat(False)

    def wait(self) -> None:
        """The others wait for rank 0 to be done."""
        while not self.beat(True):
            pass


def _label(context: StageContext, tracker: Tracker) -> None:
    """Rank 0 lets the annotators that are programs label; all ranks return together."""
    heartbeat = _Heartbeat(context.runtime.broadcast_object)
    if not context.runtime.is_main:
        heartbeat.wait()
        return
    config, runtime = context.config, context.runtime
    asked = AskedTasks.read(context.stage.path / FILE)
    assert asked is not None
    load_model = folder_loader(None, config.model, dtype=runtime.dtype, device=runtime.device, policy_tokenizer=None)
    resources = AnnotatorResources(
        config.seed,
        tokenizer=load_tokenizer(context.inputs["policy"], config.model, key="collect.policy"),
        load_model=load_model,
        device=runtime.device,
        dtype=runtime.dtype,
    )
    by_gold = set(asked.tasks["test"]) if config.preferences.gold_labels_test else set[str]()
    gold = RuleAnnotator(name="gold", reward=GoldReward())
    with _open_store(context) as store:
        for annotator, tasks in (
            (config.preferences.annotator, [task for task in asked.everything if task not in by_gold]),
            (gold, [task for task in asked.everything if task in by_gold]),
        ):
            if tasks:
                summary = label_tasks(
                    store,
                    make_annotators(annotator, resources),
                    tasks,
                    numbers=asked.numbers,
                    chunk_size=CHUNK_SIZE,
                    report=tracker.message,
                    progress=heartbeat.working,
                )
                for line in [] if summary.is_plain else [f"collect: {summary}", *summary.details]:
                    tracker.message(line)
    heartbeat.beat(True)


def _lacking(context: StageContext) -> str | None:
    """What to tell whoever started the run when labels of people are missing; None when all are there."""
    asked = AskedTasks.read(context.stage.path / FILE)
    assert asked is not None
    with _open_store(context) as store:
        missing = missing_of_people(store, asked, context.config.preferences.num_declines)
    return what_to_do(context.config, context.run.path, missing) if missing.num_missing else None


# --- exporting --------------------------------------------------------------------------------------------------------


def _export(context: StageContext, wanted: dict[SplitName, int], tracker: Tracker) -> dict[str, object]:
    """Resolves the labels and writes the records under their unfinished names; the summary."""
    config = context.config
    section = config.preferences
    asked = AskedTasks.read(context.stage.path / FILE)
    assert asked is not None
    rule = ResolutionRule(**section.resolution.model_dump())
    with _open_store(context) as store:
        before = earlier_tasks(store, section.round) if section.use_rounds == "all" else []
        own = [task for split in SPLITS for task in asked.tasks[split]]
        exported = export_labels(
            store, rule=rule, tasks=[*before, *own], split_of=_splits(context), split_rule=SPLIT_RULE
        )
        by_gold = set(asked.tasks["test"]) if section.gold_labels_test else set[str]()
        labelled = [task for task in own if task not in by_gold]
        gold = gold_reward if isinstance(config.data, EmbeddedData) else None
        figures = label_figures(store, labelled, asked.checks, gold=gold, confidence=config.evaluate.confidence)
    _write(context, exported)
    summary: dict[str, object] = {}
    done = 0
    for split in SPLITS:
        comparisons, ratings = exported.comparisons.named(split), exported.ratings.named(split)
        num_records = len(ratings) if ratings else len(comparisons)
        done += wanted[split]
        mean = asked.gold_score_mean.get(split)
        tracker.log(
            done,
            {
                "collect/comparisons": num_records,
                **({} if mean is None else {"collect/gold_score_mean": mean}),
                "collect/pairs_left_out": wanted[split] - len(asked.tasks[split]),
            },
        )
        summary[f"num_{split}"] = num_records
        summary[f"content_hash_{split}"] = content_hash([*comparisons, *ratings])
    return summary | figures


def _splits(context: StageContext) -> Callable[[PromptContent], SplitName]:
    """The split of a prompt: that of the data, and by its hash where an earlier round had prompts from elsewhere."""
    config = context.config.data
    found = load_prompts(config)
    known = {prompt_key(prompt.prompt): split for split in SPLITS for prompt in found.named(split)}
    shares = getattr(source_of(config, "prompts"), "splits", SplitConfig())

    def split(prompt: PromptContent) -> SplitName:
        key = prompt_key(prompt)
        return known[key] if key in known else split_of(key, shares)

    return split


def _write(context: StageContext, exported: ExportedLabels) -> None:
    """The records of every split and the dataset card, under their unfinished names."""
    with writing_partial(context, "comparisons") as folder:
        folder.mkdir(parents=True)
        for split in SPLITS:
            write_text(folder / f"{split}.jsonl", _lines(exported.comparisons.named(split)))
        card = make_card(exported)
        write_json(folder / "card.json", card)
        write_text(folder / "README.md", render_card(card, _files(exported)))
    if context.config.preferences.kind == "rating":
        with writing_partial(context, "ratings") as folder:
            folder.mkdir(parents=True)
            for split in SPLITS:
                write_text(folder / f"{split}.jsonl", _lines(exported.ratings.named(split)))


def _files(exported: ExportedLabels) -> dict[str, dict[str, str]]:
    """The files that have records, by split, as the card's front matter names them."""
    return {"comparisons": {split: f"{split}.jsonl" for split in SPLITS if exported.comparisons.named(split)}}


def _lines(records: Sequence[Comparison] | Sequence[RatedResponse]) -> str:
    return "".join(dump_line(record) + "\n" for record in records)
