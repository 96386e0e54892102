"""The preference store: what was asked, of whom, what was on the screen, and every version of what was answered."""

from rlhf.preferences.store.answers import (
    NUM_RESPONSES,
    STRENGTHS,
    Answer,
    BothBad,
    Choice,
    Flag,
    FlagKind,
    LabelKind,
    Ranking,
    Rating,
    Skip,
    TaskKind,
    Tie,
    agrees,
)
from rlhf.preferences.store.assignments import (
    Annotator,
    Assignment,
    AssignmentState,
    RefusalReason,
    RefusedError,
    Screen,
)
from rlhf.preferences.store.content import (
    AnnotatorKind,
    Policy,
    Response,
    Task,
    TaskPlan,
    prompt_id,
    response_id,
    task_id,
)
from rlhf.preferences.store.database import Clock, utc_now
from rlhf.preferences.store.figures import AnnotatorFigures, RoundProgress, Standing, TaskCounts, Totals
from rlhf.preferences.store.labels import Label, Reconstruction
from rlhf.preferences.store.recording import MadeLabel
from rlhf.preferences.store.schema import SCHEMA_VERSION
from rlhf.preferences.store.store import PreferenceStore

__all__ = [
    "NUM_RESPONSES",
    "SCHEMA_VERSION",
    "STRENGTHS",
    "Annotator",
    "AnnotatorFigures",
    "AnnotatorKind",
    "Answer",
    "Assignment",
    "AssignmentState",
    "BothBad",
    "Choice",
    "Clock",
    "Flag",
    "FlagKind",
    "Label",
    "LabelKind",
    "MadeLabel",
    "Policy",
    "PreferenceStore",
    "Ranking",
    "Rating",
    "Reconstruction",
    "RefusalReason",
    "RefusedError",
    "Response",
    "RoundProgress",
    "Screen",
    "Skip",
    "Standing",
    "Task",
    "TaskCounts",
    "TaskKind",
    "TaskPlan",
    "Tie",
    "Totals",
    "agrees",
    "prompt_id",
    "response_id",
    "task_id",
    "utc_now",
]
