"""`rlhf label`: serves the labelling page of a preference store."""

from __future__ import annotations

import hashlib
import html
import socket
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

import rlhf
from rlhf.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section
from rlhf.config.errors import Problem, close_names, config_error, did_you_mean, shorten
from rlhf.config.overrides import KEY, join_spaced
from rlhf.config.schema import value_type
from rlhf.config.values import from_text
from rlhf.errors import EXIT_SUCCESS, ConfigError, DataError
from rlhf.listening import address, is_local, listen
from rlhf.preferences.page.app import STATIC, Page, make_app
from rlhf.preferences.page.desk import PAGE, Desk, DeskError, DeskSettings
from rlhf.preferences.page.guard import GuardSettings
from rlhf.preferences.page.serving import host_names, make_server
from rlhf.preferences.page.tokens import Tokens, cookie_name, load_tokens, token_file, write_private
from rlhf.preferences.store import PreferenceStore
from rlhf.terminal import say, warn

# Files that are imported; somebody may name one as the store.
_FILES = (".csv", ".gz", ".json", ".jsonl", ".parquet", ".tsv")


class LabelOptions(Section):
    """What `rlhf label` takes."""

    store: str = Field(description="the preference store, an SQLite file")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8600, description="0 takes a free one")
    host: str = Field("127.0.0.1", description="the address to bind to; 0.0.0.0 for all of this machine")
    url: str | None = Field(None, description="the page's address for browsers, where a proxy with TLS stands in front")
    hosts: tuple[str, ...] = Field((), description="more names by which browsers may address the page")
    instructions: str | None = Field(None, description="a markdown file that annotators read")
    annotators: tuple[str, ...] = Field((), description="the people who get a link each; without, one link for all")
    lease_minutes: PositiveFloat = Field(10.0, description="the time to answer before a task goes to others")
    repeat_gap: NonNegativeInt = Field(10, description="labels between a task and its blind repeat")
    import_file: str | None = Field(None, alias="import", description="a file whose tasks and labels are added first")
    num_labels: PositiveInt | None = Field(None, description="the labels that each task wants at least")
    new_tokens: bool = Field(False, description="make new links; the old ones stop working")
    open_browser: bool = Field(False, description="open the page in a browser of this machine")
    access_log: bool = Field(False, description="print a line for each request, without tokens")


def run_label(arguments: Sequence[str]) -> int:
    """Serves the page until Ctrl-C. Returns the exit code.

    Raises `ConfigError` for arguments that are wrong, and whatever the store says of its file.
    """
    options = parse_options(arguments)
    text = _instructions(options)
    path = Path(options.store)
    with _open_store(path, options) as store:
        if options.num_labels is not None:
            _want(store, options.num_labels)
        desk = Desk(
            store,
            DeskSettings(
                lease_seconds=60 * options.lease_minutes,
                repeat_gap=options.repeat_gap,
                instructions=text,
                page=page_version(),
            ),
        )
        people = _enrol(desk, options.annotators)
        tokens = load_tokens(path, people, renew=options.new_tokens)
        with listen(options.host, options.port) as listening:
            port = listening.getsockname()[1]
            server = make_server(make_app(Page(desk, tokens, _guard(options))))
            links = _links(options.url or address(options.host, port), tokens)
            _announce(store, options, port, links)
            with opened(path, links[0][1]) if options.open_browser else nullcontext():
                server.run(sockets=[listening])
    return EXIT_SUCCESS


def parse_options(arguments: Sequence[str]) -> LabelOptions:
    """The options of `key=value` arguments; `--key=value` and `--key value` mean the same.

    Raises `ConfigError` that names every mistake.
    """
    fields = {field.alias or name: field for name, field in LabelOptions.model_fields.items()}
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for argument in join_spaced(arguments):
        key, equals, text = argument.removeprefix("--").partition("=")
        if not (equals and KEY.fullmatch(key)):
            problems.append(Problem(shorten(argument) or "''", "expected key=value, such as store=labels.sqlite"))
        elif key not in fields:
            near = did_you_mean(close_names(key, list(fields)))
            problems.append(Problem(key, f"unknown key{near} rlhf label has {', '.join(fields)}", text, "argument"))
        else:
            texts[key] = text
            values[key] = from_text(text, value_type(fields[key].annotation))
    try:
        options = None if problems else LabelOptions.model_validate(values)
    except ValidationError as error:
        for detail in error.errors():
            key = str(detail["loc"][0])
            message = f"{detail['msg']}; it is {fields[key].description}" if key in fields else detail["msg"]
            problems.append(Problem(key, message, texts.get(key), "argument" if key in texts else None))
        options = None
    if options is None:
        raise config_error(problems)
    return _checked(options)


def _checked(options: LabelOptions) -> LabelOptions:
    """Raises `ConfigError` for values that do not go together, or that are no address."""
    if options.url is not None:
        parts = urlsplit(options.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigError(f"url={options.url}: expected scheme and host alone, such as https://label.example.org")
    if len(set(options.annotators)) != len(options.annotators):
        raise ConfigError(f"annotators={list(options.annotators)}: a name is there twice; name each person once")
    return options


def page_version() -> str:
    """What is stored with each assignment: the version of the program and a hash of the page's files."""
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(STATIC.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(STATIC).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{PAGE} {rlhf.__version__} {digest.hexdigest()}"


def _instructions(options: LabelOptions) -> str | None:
    if options.instructions is None:
        return None
    try:
        return Path(options.instructions).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"instructions={options.instructions} cannot be read: {error}; name a markdown file in UTF-8"
        ) from error


def _open_store(path: Path, options: LabelOptions) -> PreferenceStore:
    if options.import_file is not None:
        return _import(path, Path(options.import_file))
    if not path.exists():
        raise ConfigError(
            f"store={path}: nothing is there. Stage collect with preferences.annotator=human makes a store, and "
            f"`rlhf label store={path} import=FILE` or `rlhf preferences import` fill one from a file"
        )
    try:
        return PreferenceStore.open(path)
    except DataError as error:
        if path.suffix not in _FILES:
            raise
        raise DataError(
            f"{error}. To label what a file of prompts and responses holds, let it be imported into a store: "
            f"rlhf label store={path.with_suffix('.sqlite')} import={path}"
        ) from error


def _import(path: Path, source: Path) -> PreferenceStore:
    """The store with what a file holds; what is there already is not added again."""
    from rlhf.preferences.exchange import check_file, import_file

    if not path.exists():
        # A file that cannot be read should not leave an empty store behind.
        check_file(source)
    store = PreferenceStore.open_or_create(path, seed=0)
    try:
        say(str(import_file(store, source)))
    except BaseException:  # whatever it is rises, with the store closed
        store.close()
        raise
    return store


def _want(store: PreferenceStore, num_labels: int) -> None:
    """Lets each ordinary task want as many labels; closed ones, and those that want more, stay."""
    fewer = [
        task.id
        for task in store.tasks().values()
        if task.plan.gold is None and task.plan.repeat_of is None and 0 < task.plan.num_labels < num_labels
    ]
    store.replan(fewer, num_labels=num_labels)


def _enrol(desk: Desk, names: Sequence[str]) -> list[str]:
    try:
        return [desk.enrol(name) for name in names]
    except DeskError as error:
        raise ConfigError(f"annotators={list(names)}: {error}") from error


def _guard(options: LabelOptions) -> GuardSettings:
    more = [*options.hosts]
    origin = None
    if options.url is not None:
        parts = urlsplit(options.url)
        origin = f"{parts.scheme}://{parts.netloc}".lower()
        more.append(parts.hostname or "")
    return GuardSettings(
        cookie=cookie_name(Path(options.store)),
        hosts=host_names(options.host, more),
        origin=origin,
        access_log=warn if options.access_log else None,
    )


def _links(base: str, tokens: Tokens) -> list[tuple[str, str]]:
    """For whom a link is, and the link; that for the admin view comes last."""
    base = base.rstrip("/")
    links = [(name, f"{base}/?token={token}") for name, token in tokens.people.items()]
    if not links:
        links.append(("annotators", f"{base}/?token={tokens.annotator}"))
    return [*links, ("admin view", f"{base}/admin?token={tokens.admin}")]


def _why_nothing(num_wanted: int) -> str:
    if num_wanted > 0:
        return "every task has its labels, those of an imported file among them; num_labels=N wants N"
    return "the store has no task for people; import=FILE adds some, and so does a run that writes to it"


@contextmanager
def opened(store: Path, link: str) -> Iterator[None]:
    """Opens a link in the browser by a file of the owner's: everybody on the machine can read a program's arguments."""
    path = store.absolute().with_name(f"{store.name}.open.html")
    target = html.escape(link)
    write_private(
        path, f'<!doctype html><title>rlhf label</title><meta http-equiv="refresh" content="0; url={target}">\n'
    )
    # A browser in the terminal would block until it is closed.
    threading.Thread(target=webbrowser.open, args=(path.as_uri(),), daemon=True).start()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _announce(store: PreferenceStore, options: LabelOptions, port: int, links: Sequence[tuple[str, str]]) -> None:
    totals = store.totals("human")
    say(f"rlhf label: {store.path}: {totals.num_there:,} of {totals.num_wanted:,} labels by people are there")
    if totals.num_there >= totals.num_wanted:
        say(f"Nothing is left to label: {_why_nothing(totals.num_wanted)}.")
    width = max(len(name) for name, _ in links)
    for name, link in links:
        say(f"  {name:<{width}}  {link}")
    say(f"The links hold secrets, kept in {token_file(store.path)}; new_tokens=true makes new ones. Ctrl-C ends.")
    if not is_local(options.host) and not (options.url or "").startswith("https:"):
        warn(
            f"rlhf label: bound to {options.host}: other machines can reach the page, and this is plain HTTP, so that "
            "whoever is on the way reads links and labels. Put a server with TLS in front and name it with "
            "url=https://NAME, or leave host alone and let each annotator open a tunnel:\n"
            f"  ssh -N -L {port}:127.0.0.1:{port} USER@{socket.gethostname()}"
        )
