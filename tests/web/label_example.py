"""A store to try the labelling page with, and a page in a thread for tests.

`python -m tests.web.label_example PATH` makes the store; `rlhf label store=PATH` serves it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from rlhf.listening import listen
from rlhf.preferences.page.app import Page, make_app
from rlhf.preferences.page.desk import Desk, DeskSettings
from rlhf.preferences.page.guard import GuardSettings
from rlhf.preferences.page.serving import host_names, make_server
from rlhf.preferences.page.tokens import Tokens, cookie_name, load_tokens
from rlhf.preferences.store import Choice, Policy, PreferenceStore, Response, TaskKind, TaskPlan
from rlhf.records import Message, Prompt, PromptContent

MARKDOWN = """## Two ways

1. **Boil** the egg for *seven* minutes.
2. Cool it in `cold water`.

| minutes | yolk |
|---|---|
| 5 | runny |
| 9 | firm |

> Salt the water: shells crack less.

See [the manual](https://example.org/eggs)."""
CODE = '''```python
def median(values: list[float]) -> float:
    """The middle one of the values."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
```
It is wrong for an even number of values.'''
CODE_FIXED = CODE.replace(
    "ordered[len(ordered) // 2]", "(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2"
)
CHAT: PromptContent = (
    Message("system", "You answer in one sentence."),
    Message("user", "Why is the sky blue?"),
    Message("assistant", "Because air scatters blue light more than red."),
    Message("user", "And why is it red in the evening?"),
)
PAIRS: list[tuple[PromptContent, str, str]] = [
    ("Name a colour.", "Blue.", "I would rather not say."),
    ("How do I boil an egg?", MARKDOWN, "Put it into boiling water for seven minutes."),
    ("Write a median in Python.", CODE, CODE_FIXED.replace("It is wrong", "It is right")),
    (CHAT, "The light passes more air, which takes the blue out.", "Because the sun is tired by then."),
    ("Summarise: the ship left the harbour at dawn.", "The ship left at dawn.", "A ship left a harbour at dusk."),
]
RANKED: tuple[PromptContent, tuple[str, ...]] = (
    "Give me one tip for sleeping well.",
    ("Go to bed at the same time.", "Sleep.", "Drink coffee at ten.", "Keep the room dark and cool."),
)
# Seconds that a request, or the end of the server, may take: only what never happens is a failure.
TIMEOUT = 60.0
# What a page could never send: answers to a pair, fields of a submission, bodies of any request.
IMPOSSIBLE_ANSWERS: list[Any] = [
    {"kind": "choice", "position": 2, "strength": 1},
    {"kind": "choice", "position": 0, "strength": 4},
    {"kind": "choice", "position": 0.5, "strength": 1},
    {"kind": "choice", "position": -1, "strength": 1},
    {"kind": "choice", "position": True, "strength": 1},
    {"kind": "choice", "preferred": "id", "strength": 1},
    {"kind": "ranking", "tiers": [[0], [1]]},
    {"kind": "rating", "ratings": [1]},
    {"kind": "retract"},
    {},
    None,
    "skip",
]
IMPOSSIBLE_FIELDS: list[dict[str, Any]] = [
    {"token": "short"},
    {"token": "with spaces in it"},
    {"token": "x" * 101},
    {"seconds": -1},
    {"seconds": "1"},
    {"comment": "x" * 4001},
    {"comment": "half a \ud800 pair"},
    {"flags": [{"kind": "boring"}]},
    {"flags": [{"kind": "unsafe", "position": 2}]},
    {"assignment": 2**70},
    {"assignment": "1"},
    {"gold": True},
]
NO_BODIES = [b"", b"{", b"[]", b"null", b'{"a": NaN}', b"\xff\xfe", b"[" * 30000]


def fill(store: PreferenceStore, *, num_labels: int = 1) -> None:
    """Adds pairs of text, markdown, code and a chat; a gold question; a blind repeat; a ranking of 4; two ratings."""
    tasks = [add_task(store, prompt, (first, second), num_labels=num_labels) for prompt, first, second in PAIRS]
    first, second = store.tasks([tasks[0]])[tasks[0]].plan.responses
    store.add_tasks([TaskPlan("pairwise", (first, second), num_labels=num_labels, repeat_of=tasks[0])])
    right, wrong = _add_responses(store, "What is two and two?", ("Four.", "Five."))
    gold = TaskPlan("pairwise", (right, wrong), num_labels=num_labels, gold=Choice(right), strategy="secret-strategy")
    store.add_tasks([gold])
    add_task(store, *RANKED, num_labels=num_labels, kind="ranking")
    for prompt, text in (("Tell a joke.", "A horse walks into a bar."), (CHAT, MARKDOWN)):
        add_task(store, prompt, (text,), num_labels=num_labels, kind="rating", scale=7)


def add_pairs(store: PreferenceStore, number: int, *, num_labels: int = 1) -> list[str]:
    """Adds `number` short pairs; returns the ids of the tasks."""
    prompts = store.add_prompts(Prompt(f"Question {index}?") for index in range(number))
    responses = store.add_responses(
        Response(prompt, f"Text {side} of question {index}. " + "Some words more. " * 20)
        for index, prompt in enumerate(prompts)
        for side in "AB"
    )
    pairs = zip(responses[::2], responses[1::2], strict=True)
    return store.add_tasks(TaskPlan("pairwise", pair, num_labels=num_labels) for pair in pairs)


def add_task(
    store: PreferenceStore,
    prompt: PromptContent,
    texts: Sequence[str],
    *,
    num_labels: int = 1,
    kind: TaskKind = "pairwise",
    scale: int | None = None,
) -> str:
    """Adds one task about texts that answer a prompt; returns its id."""
    responses = _add_responses(store, prompt, texts)
    return store.add_tasks([TaskPlan(kind, responses, num_labels=num_labels, scale=scale)])[0]


def _add_responses(store: PreferenceStore, prompt: PromptContent, texts: Sequence[str]) -> tuple[str, ...]:
    (key,) = store.add_prompts([Prompt(prompt, {"source": "secret-source"})])
    (policy,) = store.add_policies([Policy("secret-policy-hash", {"model": "secret-model-name"})])
    return tuple(store.add_responses(Response(key, text, policy, number=n) for n, text in enumerate(texts)))


@dataclass
class RunningPage:
    """A page that serves at `url` until its context ends."""

    store: PreferenceStore
    tokens: Tokens
    url: str
    cookie: str
    _clients: list[httpx.Client] = field(default_factory=list)

    def link(self, person: str | None = None) -> str:
        """The link for annotators, or that of one of them."""
        return f"{self.url}/?token={self.tokens.annotator if person is None else self.tokens.people[person]}"

    @property
    def admin_link(self) -> str:
        """The link for the admin view."""
        return f"{self.url}/admin?token={self.tokens.admin}"

    def client(self, name: str | None = None, *, link: str | None = None) -> httpx.Client:
        """A client that has entered, with the headers of the page, and has said its name when one is given."""
        client = httpx.Client(base_url=self.url, headers={"X-RLHF": "1"}, timeout=TIMEOUT, verify=False)
        self._clients.append(client)
        assert client.get(link or self.link()).status_code == 303
        if name is not None:
            assert client.post("/api/annotator", json={"name": name}).status_code == 200
        return client

    def admin(self) -> httpx.Client:
        """A client with the admin's rights."""
        return self.client(link=self.admin_link)

    def close(self) -> None:
        """Closes the clients."""
        for client in self._clients:
            client.close()


@contextmanager
def running_page(
    store: PreferenceStore,
    settings: DeskSettings | None = None,
    *,
    people: Sequence[str] = (),
    guard: GuardSettings | None = None,
) -> Iterator[RunningPage]:
    """The page of a store, served by uvicorn in a thread on a free port."""
    desk = Desk(store, settings or DeskSettings())
    tokens = load_tokens(store.path, [desk.enrol(name) for name in people])
    cookie = cookie_name(store.path)
    guard = guard or GuardSettings("", host_names("127.0.0.1"), wrong_token_seconds=0.01)
    server = make_server(make_app(Page(desk, tokens, replace(guard, cookie=cookie))))
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        page = RunningPage(store, tokens, f"http://127.0.0.1:{listening.getsockname()[1]}", cookie)
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield page
        finally:
            page.close()
            server.should_exit = True
            thread.join(TIMEOUT)
            assert not thread.is_alive()


if __name__ == "__main__":
    with PreferenceStore.create(Path(sys.argv[1]), seed=1) as made:
        fill(made, num_labels=3)
