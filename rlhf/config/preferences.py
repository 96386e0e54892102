"""`preferences`: what stage collect asks about the responses it samples, of whom, and how answers become one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf.config.annotators import AnnotatorConfig, AnyAnnotatorConfig, SimulatedAnnotators
from rlhf.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Probability, Section
from rlhf.config.chat import PRACTICAL_FIELDS
from rlhf.config.rewards import RewardConfig

# The fewest and the most responses that a task of a kind needs of one prompt.
NUM_RESPONSES = {"pairwise": (2, None), "ranking": (4, 9), "rating": (1, None)}
# The key of the reward model that chooses, below `preferences`.
SELECTION_MODEL = "selection.reward_model"
# How annotators are asked, which leaves what they have answered as it is.
PAGE_FIELDS = frozenset({"serve", "host", "port", "poll_seconds", "instructions", "lease_minutes"})
_PRACTICAL = {"human": PAGE_FIELDS, "judge": PRACTICAL_FIELDS | {"model"}}
# Keys of the section that leave what a run is alone.
BOOKKEEPING = ("store", "wait", *(f"annotator.{name}" for name in sorted(PAGE_FIELDS | PRACTICAL_FIELDS)))
# Fields that name a file whose content decides.
_FILE_FIELDS = {"judge": ("template", "ranking_template", "rating_template"), "function": ("file",)}
Share = Annotated[float, Field(ge=0, lt=1)]


class RandomSelection(Section):
    """Whatever chance draws; with the default pool, everything that was sampled."""

    type: Literal["random"] = "random"
    pool_factor: PositiveFloat = Field(1.0, description="prompts that are sampled for each task that is asked")


class _ScoredSelection(Section):
    reward_model: str | None = Field(None, description="folder of the reward model, or ensemble, that scores the pool")
    pool_factor: PositiveFloat = Field(4.0, description="prompts that are sampled for each task that is asked")
    random_share: Probability = Field(0.0, description="share of the tasks that chance chooses instead")


class BestWorstSelection(_ScoredSelection):
    """The best against the worst of a prompt's responses by the reward model, of prompts that chance draws."""

    type: Literal["best_worst"] = "best_worst"
    pool_factor: PositiveFloat = Field(1.0, description="prompts that are sampled for each task that is asked")


class NearTieSelection(_ScoredSelection):
    """The responses whose scores by the reward model differ least."""

    type: Literal["near_tie"] = "near_tie"


class DisagreementSelection(_ScoredSelection):
    """What the members of an ensemble disagree on most: the variance of their preferences."""

    type: Literal["disagreement"] = "disagreement"


class DiversitySelection(Section):
    """What lies farthest from everything chosen before, by mean last hidden states (k-center greedy)."""

    type: Literal["diversity"] = "diversity"
    embeddings: Literal["policy", "reward_model"] = Field("policy", description="the model whose hidden states count")
    reward_model: str | None = Field(None, description="folder of the reward model, with embeddings=reward_model")
    pool_factor: PositiveFloat = Field(4.0, description="prompts that are sampled for each task that is asked")
    random_share: Probability = Field(0.0, description="share of the tasks that chance chooses instead")

    @model_validator(mode="after")
    def _model_is_used(self) -> DiversitySelection:
        if (self.embeddings == "reward_model") != (self.reward_model is not None):
            raise ValueError(
                f"embeddings={self.embeddings} with reward_model={self.reward_model or 'null'}: the one needs the "
                "folder of a reward model in reward_model, and embeddings=policy has no use for it"
            )
        return self


SelectionConfig = Annotated[
    RandomSelection | BestWorstSelection | NearTieSelection | DisagreementSelection | DiversitySelection,
    Field(discriminator="type"),
]


class ResolutionConfig(Section):
    """The rule by which several labels of one task become one: see `rlhf.preferences.resolution`."""

    kind: Literal["majority", "mean", "all"] = Field(
        "majority", description="the most frequent choice, the mean probability, or every label by itself"
    )
    on_tied_vote: Literal["drop", "tie"] = Field("drop", description="majority: leave a tied vote out, or keep a tie")
    both_bad: Literal["tie", "leave_out"] = Field("tie", description="what a label of both bad counts as")
    use_strength: bool = Field(False, description="mean and all: a choice's strength moves its probability")


class PreferencesConfig(Section):
    """What is asked, and of whom. `collect.num_comparisons` says how many tasks, and how responses are sampled."""

    store: str | None = Field(
        None, description="preference store (SQLite), made if missing; null is the stage's own, preferences.sqlite"
    )
    annotator: AnnotatorConfig = Field(SimulatedAnnotators(), description="who labels")
    kind: Literal["pairwise", "ranking", "rating"] = Field("pairwise", description="what a task asks for")
    num_responses: PositiveInt = Field(2, description="responses sampled to a prompt; a ranking asks about all of them")
    rating_scale: Annotated[int, Field(ge=2)] = Field(5, description="best rating; the worst is 1")
    labels_per_task: PositiveInt = Field(1, description="annotators that are asked each task")
    round: NonNegativeInt = Field(0, description="round of the loop; each has random numbers of its own")
    use_rounds: Literal["all", "current"] = Field(
        "all", description="comparisons also of the earlier rounds that the store has, or of this round alone"
    )
    resolution: ResolutionConfig = Field(ResolutionConfig(), description="how several labels become one")
    test_labels: Literal["auto", "gold", "annotator"] = Field(
        "auto", description="who labels the test split: the gold reward, the annotator; auto: gold if simulated by it"
    )
    repeat_share: Share = Field(0.0, description="blind repeats, as a share of the training tasks")
    gold_share: Share = Field(0.0, description="questions whose answer is known, as a share of the training tasks")
    num_declines: PositiveInt = Field(
        1, description="annotators who skipped a task after whom its labels are no longer waited for"
    )
    wait: bool = Field(True, description="wait for people; false: end with exit code 75 until all labels are there")
    selection: SelectionConfig = Field(RandomSelection(), description="which of the sampled responses are asked about")

    @model_validator(mode="after")
    def _responses_fit_kind(self) -> PreferencesConfig:
        least, greatest = NUM_RESPONSES[self.kind]
        if self.num_responses < least or (greatest is not None and self.num_responses > greatest):
            wanted = f"at least {least}" if greatest is None else f"{least} to {greatest}"
            raise ValueError(f"kind={self.kind} needs num_responses of {wanted}, not {self.num_responses}")
        return self

    @model_validator(mode="after")
    def _selection_fits_kind(self) -> PreferencesConfig:
        selection = self.selection
        if selection.type == "best_worst" and (self.kind != "pairwise" or self.num_responses < 3):
            raise ValueError("selection.type=best_worst needs kind=pairwise and num_responses of at least 3")
        if selection.type == "near_tie" and self.kind == "rating":
            raise ValueError("selection.type=near_tie needs responses to compare: set kind=pairwise or kind=ranking")
        if isinstance(selection, _ScoredSelection) and selection.reward_model is None:
            raise ValueError(
                f"selection.type={selection.type} needs a reward model in selection.reward_model: name its folder, or "
                "set selection.type=random"
            )
        if self.num_candidates * selection.pool_factor < 1:
            raise ValueError(
                f"selection.pool_factor={selection.pool_factor:g} samples fewer candidates than tasks: of "
                f"num_responses={self.num_responses} responses come {self.num_candidates}, so it must be at least "
                f"{1 / self.num_candidates:.4g}"
            )
        return self

    @model_validator(mode="after")
    def _enough_annotators(self) -> PreferencesConfig:
        for annotator in single_annotators(self.annotator):
            there = pool_size(annotator)
            if there is not None and there < self.labels_per_task:
                raise ValueError(
                    f"labels_per_task={self.labels_per_task} wants as many annotators of each task, and "
                    f"annotator.type={annotator.type} has {there}"
                )
        return self

    @property
    def num_candidates(self) -> int:
        """What can be asked of the responses to one prompt, before equal texts are left out."""
        if self.kind == "ranking" or self.selection.type == "best_worst":
            return 1
        return self.num_responses if self.kind == "rating" else math.comb(self.num_responses, 2)

    @property
    def asks_people(self) -> bool:
        """Whether people label at least some of the tasks."""
        return any(annotator.type == "human" for annotator in single_annotators(self.annotator))

    @property
    def gold_labels_test(self) -> bool:
        """Whether the corpus's gold reward labels the test split: where annotators want it, unless the config says."""
        if self.test_labels != "auto":
            return self.test_labels == "gold"
        annotator = self.annotator
        if annotator.type != "simulated" or annotator.reward.type != "gold":
            return False
        return annotator.reward.wants == "favourable"


def single_annotators(annotator: AnyAnnotatorConfig) -> Iterator[AnyAnnotatorConfig]:
    """The annotator itself, or those of a mixture's parts."""
    if annotator.type == "mixture":
        for part in annotator.parts.values():
            yield part.annotator
    else:
        yield annotator


def pool_size(annotator: AnyAnnotatorConfig) -> int | None:
    """How many annotators a section stands for; None for people, of whom there may be any number."""
    if annotator.type == "human":
        return None
    return annotator.num_annotators if annotator.type == "simulated" else 1


def _named_annotators(preferences: PreferencesConfig) -> dict[str, AnyAnnotatorConfig]:
    """The annotators by the key of their section below `preferences`."""
    annotator = preferences.annotator
    if annotator.type == "mixture":
        return {f"annotator.parts.{name}.annotator": part.annotator for name, part in annotator.parts.items()}
    return {"annotator": annotator}


def annotator_rewards(preferences: PreferencesConfig) -> dict[str, RewardConfig]:
    """The rewards that annotators go by, by their key below `preferences`."""
    named = _named_annotators(preferences).items()
    return {f"{key}.reward": one.reward for key, one in named if one.type in ("simulated", "rule")}


def model_inputs(preferences: PreferencesConfig) -> dict[str, str]:
    """The folders and hub ids of models that stage collect reads besides the policy, by the key of each."""
    paths = {f"{key}.path": getattr(reward, "path", None) for key, reward in annotator_rewards(preferences).items()}
    for key, annotator in _named_annotators(preferences).items():
        if annotator.type == "judge":
            paths[f"{key}.model"] = annotator.model
    paths[SELECTION_MODEL] = getattr(preferences.selection, "reward_model", None)
    return {f"preferences.{key}": path for key, path in paths.items() if path is not None}


def annotator_files(preferences: PreferencesConfig) -> dict[str, str]:
    """The files that decide what annotators answer, by their key below `preferences`; those of rewards aside."""
    found = {}
    for key, annotator in _named_annotators(preferences).items():
        for name in _FILE_FIELDS.get(annotator.type, ()):
            if (path := getattr(annotator, name)) is not None:
                found[f"{key}.{name}"] = path
    return found


def decisive_content(preferences: PreferencesConfig) -> dict[str, Any]:
    """The section as plain values without what leaves the comparisons as they are: places, prices, the page.

    Models and files count by their content: see `model_inputs`, `annotator_rewards` and `annotator_files`.
    """
    body = preferences.model_dump(mode="json", exclude={"store", "wait"})
    body["selection"].pop("reward_model", None)
    body["annotator"] = _without_practice(body["annotator"])
    return body


def _without_practice(annotator: dict[str, Any]) -> dict[str, Any]:
    if "parts" in annotator:
        parts = {
            name: {**part, "annotator": _without_practice(part["annotator"])}
            for name, part in annotator["parts"].items()
        }
        return {**annotator, "parts": parts}
    kind = annotator["type"]
    dropped = {"reward", *_FILE_FIELDS.get(kind, ()), *_PRACTICAL.get(kind, ())}
    return {name: value for name, value in annotator.items() if name not in dropped}
