"""The tables of a preference store, as SQL. What must never change is guarded by the database itself.

Every table is append-only, but for a task's plan (wanted labels, priority, places taken) and an assignment's lease and
state. Triggers refuse everything else, whoever the writer is.

An assignment takes one of its task's places while it is `leased` or `answered`. Triggers count the places in
`tasks.num_taken` and refuse one that is not there; a unique index refuses a second live assignment of a task to one
annotator. The states:

* `leased`: held by the annotator until `lease_ends`;
* `answered`: the newest version of its label is an answer;
* `declined`: the newest version is a skip, or flags without an answer: it fills no place, but is not asked again;
* `released`: given back, or retracted;
* `lapsed`: the lease ended without a label, and some later write has noticed.

Ids of content are hashes of it (`content.identity`); times are text in UTC of one fixed width, so that they sort.
"""

from __future__ import annotations

# "RLHF" in ASCII: tells a preference store from any other SQLite file.
APPLICATION_ID = 0x524C4846
SCHEMA_VERSION = 1

_TABLES = """
CREATE TABLE settings (
    name TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE prompts (
    id TEXT PRIMARY KEY NOT NULL,
    -- rlhf.records.prompt_hash in hexadecimal: what splits go by. Prompts that differ in white space share it.
    key TEXT NOT NULL,
    content TEXT NOT NULL,
    columns TEXT NOT NULL
);
CREATE INDEX prompts_by_key ON prompts (key);

CREATE TABLE policies (
    hash TEXT PRIMARY KEY NOT NULL,
    description TEXT NOT NULL
);

CREATE TABLE responses (
    id TEXT PRIMARY KEY NOT NULL,
    prompt TEXT NOT NULL REFERENCES prompts (id),
    text TEXT NOT NULL,
    policy TEXT REFERENCES policies (hash),
    sampling TEXT NOT NULL,
    seed INTEGER,
    number INTEGER
);
CREATE INDEX responses_by_prompt ON responses (prompt);

CREATE TABLE tasks (
    id TEXT PRIMARY KEY NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('pairwise', 'ranking', 'rating')),
    prompt TEXT NOT NULL REFERENCES prompts (id),
    num_labels INTEGER NOT NULL CHECK (num_labels >= 0),
    num_taken INTEGER NOT NULL DEFAULT 0 CHECK (num_taken >= 0),
    priority REAL NOT NULL,
    -- Breaks ties of priority: random, and drawn from the store's seed.
    shuffle INTEGER NOT NULL,
    round INTEGER NOT NULL CHECK (round >= 0),
    strategy TEXT NOT NULL,
    score REAL,
    audience TEXT CHECK (audience IN ('human', 'simulated', 'judge', 'rule')),
    scale INTEGER CHECK ((scale IS NOT NULL) = (kind = 'rating')),
    gold_kind TEXT,
    gold TEXT CHECK ((gold IS NULL) = (gold_kind IS NULL)),
    repeat_of TEXT REFERENCES tasks (id)
);
CREATE INDEX tasks_with_room ON tasks (priority DESC, shuffle, id) WHERE num_taken < num_labels;
CREATE INDEX tasks_by_round ON tasks (round);

-- The canonical order of a task's responses is that of their ids.
CREATE TABLE task_responses (
    task TEXT NOT NULL REFERENCES tasks (id),
    response TEXT NOT NULL REFERENCES responses (id),
    PRIMARY KEY (task, response)
) WITHOUT ROWID;

CREATE TABLE annotators (
    name TEXT PRIMARY KEY NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('human', 'simulated', 'judge', 'rule')),
    description TEXT NOT NULL
);

CREATE TABLE instructions (
    hash TEXT PRIMARY KEY NOT NULL,
    text TEXT NOT NULL
);

CREATE TABLE assignments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    task TEXT NOT NULL REFERENCES tasks (id),
    annotator TEXT NOT NULL REFERENCES annotators (name),
    shown TEXT NOT NULL,
    instructions TEXT REFERENCES instructions (hash),
    page TEXT NOT NULL,
    leased_at TEXT NOT NULL,
    lease_ends TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('leased', 'answered', 'declined', 'released', 'lapsed'))
);
CREATE UNIQUE INDEX assignments_live ON assignments (task, annotator)
    WHERE state IN ('leased', 'answered', 'declined');
CREATE INDEX assignments_by_task ON assignments (task, annotator);
CREATE INDEX assignments_by_annotator ON assignments (annotator, id);
CREATE INDEX assignments_leased ON assignments (lease_ends) WHERE state = 'leased';

CREATE TABLE labels (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    assignment INTEGER NOT NULL REFERENCES assignments (id),
    version INTEGER NOT NULL CHECK (version >= 1),
    -- The version before; each has one successor at most, so that the newest is the one without.
    supersedes INTEGER UNIQUE REFERENCES labels (id) CHECK ((supersedes IS NULL) = (version = 1)),
    token TEXT NOT NULL UNIQUE CHECK (token <> ''),
    kind TEXT NOT NULL CHECK (
        kind IN ('choice', 'tie', 'both_bad', 'skip', 'ranking', 'rating', 'flag', 'retract')
    ),
    answer TEXT CHECK ((answer IS NULL) = (kind IN ('flag', 'retract'))),
    flags TEXT NOT NULL,
    comment TEXT NOT NULL,
    seconds REAL CHECK (seconds >= 0),
    made_at TEXT NOT NULL,
    UNIQUE (assignment, version)
);
"""

_PLACES = """
CREATE TRIGGER assignments_take_a_place AFTER INSERT ON assignments WHEN NEW.state IN ('leased', 'answered')
BEGIN
    UPDATE tasks SET num_taken = num_taken + 1 WHERE id = NEW.task;
    SELECT RAISE(ABORT, 'the task has no place left') FROM tasks WHERE id = NEW.task AND num_taken > num_labels;
END;

CREATE TRIGGER assignments_take_a_place_again AFTER UPDATE OF state ON assignments
WHEN NEW.state IN ('leased', 'answered') AND OLD.state NOT IN ('leased', 'answered')
BEGIN
    UPDATE tasks SET num_taken = num_taken + 1 WHERE id = NEW.task;
    SELECT RAISE(ABORT, 'the task has no place left') FROM tasks WHERE id = NEW.task AND num_taken > num_labels;
END;

CREATE TRIGGER assignments_leave_their_place AFTER UPDATE OF state ON assignments
WHEN OLD.state IN ('leased', 'answered') AND NEW.state NOT IN ('leased', 'answered')
BEGIN
    UPDATE tasks SET num_taken = num_taken - 1 WHERE id = NEW.task;
END;
"""

_LIVE = "('leased', 'answered', 'declined')"
# What makes a row the same as another. No row of these tables is ever deleted or replaced, and none of their values
# changes but for the columns of `_CHANGING`.
_KEYS: dict[str, tuple[str, ...]] = {
    "settings": ("name = NEW.name",),
    "prompts": ("id = NEW.id",),
    "policies": ("hash = NEW.hash",),
    "responses": ("id = NEW.id",),
    "tasks": ("id = NEW.id",),
    "task_responses": ("task = NEW.task AND response = NEW.response",),
    "annotators": ("name = NEW.name",),
    "instructions": ("hash = NEW.hash",),
    "assignments": (
        "id = NEW.id",
        f"task = NEW.task AND annotator = NEW.annotator AND state IN {_LIVE} AND NEW.state IN {_LIVE}",
    ),
    "labels": (
        "id = NEW.id",
        "token = NEW.token",
        "supersedes = NEW.supersedes",
        "assignment = NEW.assignment AND version = NEW.version",
    ),
}
# The columns that stay, of the tables of which others change.
_FIXED: dict[str, str] = {
    "tasks": "id, kind, prompt, shuffle, round, strategy, score, audience, scale, gold_kind, gold, repeat_of",
    "assignments": "id, task, annotator, shown, instructions, page, leased_at",
}


def _guards(table: str) -> str:
    """Triggers that refuse DELETE, UPDATE of what is fixed, and INSERT over a row that is there.

    The last is for INSERT OR REPLACE, which removes the old row without asking a DELETE trigger.
    """
    columns = f" OF {_FIXED[table]}" if table in _FIXED else ""
    found = " OR ".join(f"EXISTS (SELECT 1 FROM {table} WHERE {same})" for same in _KEYS[table])
    refuse = f"SELECT RAISE(ABORT, 'rows of {table} stay as they are: {{}} is refused')"
    return f"""
CREATE TRIGGER {table}_keep_rows BEFORE DELETE ON {table} BEGIN {refuse.format("DELETE")}; END;
CREATE TRIGGER {table}_keep_values BEFORE UPDATE{columns} ON {table} BEGIN {refuse.format("UPDATE")}; END;
CREATE TRIGGER {table}_keep_on_insert BEFORE INSERT ON {table} WHEN {found}
BEGIN {refuse.format("a second INSERT")}; END;
"""


def schema_sql() -> str:
    """Everything that makes an empty database a preference store, but for the seed in `settings`."""
    return "\n".join(
        [
            _TABLES,
            _PLACES,
            *(_guards(table) for table in _KEYS),
            f"PRAGMA application_id = {APPLICATION_ID};",
            f"PRAGMA user_version = {SCHEMA_VERSION};",
        ]
    )
