"""Annotators that are programs, under one protocol: simulated ones, judges, rules and functions; and their mixtures."""

from rlhf.preferences.annotators.build import ANNOTATOR_KEY, AnnotatorResources, make_annotators
from rlhf.preferences.annotators.mixture import Annotators, Pool, audience_of, needs_people, part_of
from rlhf.preferences.annotators.pool import PoolAnnotator
from rlhf.preferences.annotators.protocol import Given, People, ShownResponse, ShownTask, TaskAnnotator
from rlhf.preferences.annotators.simulated import GoldReward, Judgement, SimulatedAnnotator

__all__ = [
    "ANNOTATOR_KEY",
    "AnnotatorResources",
    "Annotators",
    "Given",
    "GoldReward",
    "Judgement",
    "People",
    "Pool",
    "PoolAnnotator",
    "ShownResponse",
    "ShownTask",
    "SimulatedAnnotator",
    "TaskAnnotator",
    "audience_of",
    "make_annotators",
    "needs_people",
    "part_of",
]
