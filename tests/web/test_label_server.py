"""Names, the admin view, and the command `rlhf label` of the labelling page's server."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf.errors import ConfigError
from rlhf.listening import address, is_local, listen
from rlhf.preferences.page import command as label_command
from rlhf.preferences.page.admin import agreement, summarise
from rlhf.preferences.page.command import page_version, parse_options, run_label
from rlhf.preferences.page.desk import DeskSettings
from rlhf.preferences.page.serving import host_names
from rlhf.preferences.page.tokens import load_tokens
from rlhf.preferences.store import Annotator, Choice, Flag, MadeLabel, PreferenceStore, Skip, TaskPlan, Tie
from tests.unit.preference_store_example import HandClock
from tests.web.label_example import TIMEOUT, RunningPage, add_pairs, add_task, running_page
from tests.web.test_label_load import Server, start_server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PreferenceStore]:
    with PreferenceStore.create(tmp_path / "store.sqlite", seed=1, clock=HandClock()) as made:
        yield made


@pytest.fixture
def page(store: PreferenceStore) -> Iterator[RunningPage]:
    with running_page(store, DeskSettings(instructions="# Be *kind*")) as running:
        yield running


def post(client: httpx.Client, path: str, body: Any = None, *, status: int = 200) -> dict[str, Any]:
    """The body of the reply, which has the status expected."""
    reply = client.post(path, json={} if body is None else body)
    assert reply.status_code == status, (reply.status_code, reply.text)
    made: dict[str, Any] = reply.json()
    return made


NO_NAMES: list[Any] = ["", "   ", "x" * 81, "a\u202eb", "\u0000", "a\ud800", 7, None]


def test_a_name_is_said_once_and_kept_in_the_cookie(store: PreferenceStore, page: RunningPage) -> None:
    client = page.client()
    assert post(client, "/api/next", status=409)["reason"] == "no_name"
    me = post(client, "/api/annotator", {"name": "  anna \n karenina "})
    assert me["annotator"] == "anna karenina"
    assert me == client.get("/api/me").json()
    assert (me["may_rename"], me["admin"], me["store"]) == (True, False, "store.sqlite")
    assert me["instructions"] == "# Be *kind*"
    assert store.annotators()["anna karenina"].kind == "human"


def test_what_is_no_name(page: RunningPage) -> None:
    client = page.client()
    for name in NO_NAMES:
        content = json.dumps({"name": name})
        reply = client.post("/api/annotator", content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 422, (name, reply.text)
    assert client.get("/api/me").json()["annotator"] is None


def test_a_judge_s_name_is_taken(store: PreferenceStore, page: RunningPage) -> None:
    store.add_annotator(Annotator("judge", "judge"))
    assert post(page.client(), "/api/annotator", {"name": "judge"}, status=409)["reason"] == "name_taken"


def test_a_link_of_one_s_own_fixes_the_name(store: PreferenceStore) -> None:
    with running_page(store, people=["anna", "ben"]) as page:
        client = page.client(link=page.link("anna"))
        me = client.get("/api/me").json()
        assert (me["annotator"], me["may_rename"]) == ("anna", False)
        assert post(client, "/api/annotator", {"name": "ben"}, status=409)["reason"] == "fixed_name"
        assert post(client, "/api/next")["state"] == "finished"
        # The link for everybody, under which one could take their names, does not work.
        assert httpx.get(page.link(), timeout=TIMEOUT).status_code == 401


def test_without_instructions(store: PreferenceStore) -> None:
    with running_page(store) as page:
        assert page.client().get("/api/me").json()["instructions"] is None


def two_annotators(store: PreferenceStore) -> list[str]:
    """Anna and Ben on 4 pairs, and their checks: both chose the first twice, then they differed, then both tied."""
    tasks = add_pairs(store, 4, num_labels=2)
    plans = {task: store.tasks([task])[task].plan for task in tasks}
    first, second = ({task: plan.responses[side] for task, plan in plans.items()} for side in (0, 1))
    for name in ("anna", "ben"):
        store.add_annotator(Annotator(name, "human"))
    gold = add_task(store, "Gold?", ("yes", "no"))
    responses = store.tasks([gold])[gold].plan.responses
    gold = store.add_tasks([TaskPlan("pairwise", responses, num_labels=2, gold=Choice(responses[0]))])[0]
    repeat = store.add_tasks([TaskPlan("pairwise", plans[tasks[0]].responses, num_labels=2, repeat_of=tasks[0])])[0]
    said: dict[str, list[Any]] = {
        "anna": [Choice(first[tasks[0]]), Choice(first[tasks[1]]), Choice(first[tasks[2]]), Tie()],
        "ben": [Choice(first[tasks[0]]), Choice(first[tasks[1]]), Choice(second[tasks[2]]), Tie()],
    }
    labels = []
    for name, answers in said.items():
        for number, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
            # Anna always saw the first response on the left, Ben on the right.
            shown = plans[task].responses if name == "anna" else plans[task].responses[::-1]
            flags = (Flag("unsafe", shown[1]),) if (name, number) == ("ben", 0) else ()
            comment = "hm <b>" if (name, number) == ("anna", 1) else ""
            labels.append(MadeLabel(task, name, answer, f"{name}-{number}", shown, 10.0 + number, flags, comment))
    labels.append(MadeLabel(gold, "anna", Choice(responses[0]), "anna-gold", responses))
    labels.append(MadeLabel(gold, "ben", Choice(responses[1]), "ben-gold", responses))
    labels.append(MadeLabel(repeat, "anna", Choice(second[tasks[0]], 2), "anna-repeat", plans[tasks[0]].responses))
    store.record(labels)
    return tasks


def test_the_summary_counts_by_hand(store: PreferenceStore) -> None:
    tasks = two_annotators(store)
    store.add_annotator(Annotator("carl", "human"))
    summary = summarise(store)
    # 4 pairs, gold and repeat want 2 each, and the pair of the gold question's texts wants 1.
    assert summary["progress"] == {"wanted": 13, "done": 11, "labels": 11}
    queue = summary["queue"]
    assert {name: queue[name] for name in ("tasks", "open", "leased", "answered", "declined", "declined_by_all")} == {
        "tasks": 7, "open": 2, "leased": 0, "answered": 11, "declined": 0, "declined_by_all": 0
    }  # fmt: skip
    assert [one["round"] for one in queue["rounds"]] == [0]
    anna, ben, carl = summary["annotators"]
    # Of Anna's choices the first three and the gold one took the left response, the repeat the right one.
    assert (anna["left_share"]["value"], anna["left_share"]["count"]) == (4 / 5, 5)
    # Ben's first responses stood on the right; he chose the left at the third and the wrong one, on the right, last.
    assert (ben["left_share"]["value"], ben["left_share"]["count"]) == (1 / 4, 4)
    assert (anna["gold_accuracy"]["value"], ben["gold_accuracy"]["value"]) == (1.0, 0.0)
    assert (anna["self_consistency"]["value"], ben["self_consistency"]) == (0.0, None)
    assert (anna["labels"], anna["median_seconds"], ben["flags"], ben["skips"]) == (6, 11.5, 1, 0)
    assert (carl["labels"], carl["left_share"], carl["last"]) == (0, None, None)
    # Wilson's interval of 1 of 1.
    assert anna["gold_accuracy"]["low"] == pytest.approx(0.2065, abs=1e-4)
    (flag,) = summary["flags"]
    assert (flag["annotator"], flag["kind"], flag["position"], flag["task"]) == ("ben", "unsafe", 1, tasks[0])
    assert flag["prompt"] == "Question 0?"
    second = store.tasks([tasks[0]])[tasks[0]].plan.responses[0]
    assert flag["response"] == store.responses([second])[second].text[:300]
    assert [(one["text"], one["prompt"]) for one in summary["comments"]] == [("hm <b>", "Question 1?")]
    assert summary["pace"] == [{"hour": "2026-03-01T12:00:00+00:00", "labels": 11}]
    json.dumps(summary, allow_nan=False)


def test_agreement_by_hand(store: PreferenceStore) -> None:
    two_annotators(store)
    found = summarise(store)["agreement"]
    # Of 5 pairs (4 and the gold question) they agree on 3.
    assert found["percent"]["value"] == pytest.approx(0.6)
    # Cohen: the canonical order of the gold pair and of each pair is that of the ids, which both share.
    (kappa,) = found["cohen"]
    assert (kappa["first"], kappa["second"]) == ("anna", "ben")
    # Anna: first 4, tie 1. Ben: first 2, second 2, tie 1. By chance (4 * 2 + 1 * 1) / 25.
    assert kappa["value"] == pytest.approx((0.6 - 9 / 25) / (1 - 9 / 25))
    # Fleiss: both together 6, 2 and 2 of 10.
    assert found["fleiss"]["value"] == pytest.approx((0.6 - 0.44) / (1 - 0.44))
    # Krippendorff: 1 - 9 * (2 * 2) / (6 * 4 + 2 * 8 + 2 * 8)
    assert found["krippendorff"]["value"] == pytest.approx(1 - 9 * 4 / 56)
    # The repeat, which Anna alone answered, is no sixth.
    assert found["note"] == "Of 5 labelled pairs, 5 have labels of two or more."


def test_agreement_where_there_is_none_to_speak_of(store: PreferenceStore) -> None:
    assert agreement([], {})["note"] == "No pair has a label yet."
    (task,) = add_pairs(store, 1, num_labels=2)
    store.add_annotator(Annotator("anna", "human"))
    store.record([MadeLabel(task, "anna", Tie(), "token")])
    found = summarise(store)["agreement"]
    assert (found["percent"], found["cohen"], found["fleiss"], found["krippendorff"]) == (None, [], None, None)
    assert "No pair has labels of two annotators" in found["note"]
    store.add_annotator(Annotator("ben", "human"))
    store.record([MadeLabel(task, "ben", Tie(), "token 2")])
    # All labels are one value: kappa is undefined, which JSON has no number for.
    found = json.loads(json.dumps(summarise(store)["agreement"], allow_nan=False))
    assert (found["percent"]["value"], found["fleiss"], found["krippendorff"]) == (1.0, None, None)


def test_tasks_that_nobody_is_left_for_are_counted(store: PreferenceStore) -> None:
    (task, _) = add_pairs(store, 2)
    for name in ("anna", "ben"):
        store.add_annotator(Annotator(name, "human"))
        store.record([MadeLabel(task, name, Skip(), name)])
    store.add_annotator(Annotator("judge", "judge"))
    assert summarise(store)["queue"]["declined_by_all"] == 1


def test_the_admin_view_replans_and_exports(store: PreferenceStore, page: RunningPage) -> None:
    two_annotators(store)
    admin = page.admin()
    assert admin.get("/admin").text.startswith("<!doctype html>")
    assert admin.get("/api/admin/summary").json()["progress"]["labels"] == 11
    reply = admin.get("/api/admin/export", params={"format": "trl", "rule": "majority"})
    assert reply.headers["content-type"] == "application/zip"
    assert reply.headers["content-disposition"] == "attachment; filename*=UTF-8''store-trl-majority.zip"
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        names = archive.namelist()
        card = json.loads(archive.read("store-trl-majority/card.json"))
    assert "store-trl-majority/README.md" in names
    # The two pairs that both chose alike and the tie; the pair on which they differ is a tied vote.
    assert sum(split["num_comparisons"] for split in card["splits"].values()) == 3
    refused = admin.get("/api/admin/export", params={"format": "nothing"})
    assert (refused.status_code, refused.json()["reason"]) == (422, "export")
    assert admin.get("/api/admin/export", params={"rule": "nothing"}).status_code == 422
    changed = post(admin, "/api/admin/replan", {"num_labels": 3, "priority": 2.5, "round": 0})
    assert changed == {"tasks": 5}
    plans = [task.plan for task in store.tasks().values()]
    ordinary = [plan for plan in plans if plan.gold is None and plan.repeat_of is None]
    assert {(plan.num_labels, plan.priority) for plan in ordinary} == {(3, 2.5)}
    assert {plan.num_labels for plan in plans if plan not in ordinary} == {2}
    assert admin.get("/api/admin/summary").json()["progress"]["wanted"] == 19
    assert post(admin, "/api/admin/replan", {"num_labels": -1}, status=422)["reason"] == "invalid_body"


def test_a_failure_of_the_store_is_said_and_nothing_acknowledged(
    store: PreferenceStore, page: RunningPage, tmp_path: Path
) -> None:
    add_pairs(store, 1)
    anna = page.client("anna")
    task = post(anna, "/api/next")["task"]
    store.close()
    (tmp_path / "store.sqlite").rename(tmp_path / "gone.sqlite")
    body = {"assignment": task["assignment"], "token": "abcdefgh", "answer": {"kind": "tie"}}
    refused = post(anna, "/api/submit", body, status=503)
    assert refused["reason"] == "store"
    assert str(tmp_path) not in refused["error"]
    (tmp_path / "gone.sqlite").rename(tmp_path / "store.sqlite")
    post(anna, "/api/submit", body)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "store"),
        (["store=x", "prot=1"], "unknown key; did you mean port"),
        (["store=x", "port=70000"], "port = 70000"),
        (["store=x", "port=a"], "port = a"),
        (["store=x", "lease_minutes=0"], "lease_minutes = 0"),
        (["store=x", "repeat_gap=-1"], "repeat_gap = -1"),
        (["store=x", "url=label.example.org"], "https://label.example.org"),
        (["store=x", "url=https://example.org/deeper"], "https://label.example.org"),
        (["store=x", "annotators=[anna,anna]"], "a name is there twice"),
        (["store"], "expected key=value"),
        (["store=nowhere.sqlite"], "import=FILE"),
        (["store=STORE", "instructions=nowhere.md"], "instructions=nowhere.md cannot be read"),
        (["store=STORE", "host=256.1.1.1"], "host=256.1.1.1"),
        (["store=STORE", "host=192.0.2.1"], "no address of this machine"),
        (["store=STORE", "annotators=['']"], "A name has 1 to 80 characters"),
        (["store=STORE", "import=nowhere.jsonl"], "nowhere.jsonl"),
        (["store=other.sqlite", "import=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_wrong_arguments_say_what_is_right(
    store: PreferenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        run_label([argument.replace("STORE", str(store.path)) for argument in arguments])
    assert message in str(raised.value)
    assert not (tmp_path / "other.sqlite").exists()


def test_options_may_be_spelt_as_elsewhere() -> None:
    options = parse_options(["--store=x", "--port", "0", "annotators=[anna,ben]", "import=rows.jsonl", "url=null"])
    assert (options.store, options.port, options.annotators) == ("x", 0, ("anna", "ben"))
    assert (options.import_file, options.url, options.lease_minutes) == ("rows.jsonl", None, 10.0)


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port} is taken on 127.0.0.1"):
            listen("127.0.0.1", port)


def test_addresses() -> None:
    assert address("127.0.0.1", 8600) == "http://127.0.0.1:8600"
    assert address("::1", 8600) == "http://[::1]:8600"
    assert address("0.0.0.0", 1) == f"http://{socket.gethostname()}:1"
    assert [is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1")] == [
        True, True, True, False, False
    ]  # fmt: skip
    assert host_names("127.0.0.1") == {"127.0.0.1", "localhost", "::1"}
    assert host_names("10.0.0.1", ["Label.Example.org"]) == {
        "10.0.0.1", "label.example.org", socket.gethostname().lower()
    }  # fmt: skip


def stop(server: Server) -> str:
    """Ends a server by Ctrl-C; returns what it said on standard error."""
    server.process.send_signal(signal.SIGINT)
    _, said = server.process.communicate(timeout=TIMEOUT)
    assert server.process.returncode == 130
    return said


def test_the_command_serves_and_ends_by_ctrl_c(tmp_path: Path) -> None:
    """One link a person, the same after a restart; instructions and the page's version are stored with the label."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Which?", "chosen": "This.", "rejected": "That."}\n')
    (tmp_path / "read.md").write_text("Read *this*.")
    path = tmp_path / "store.sqlite"
    arguments = (f"import={tmp_path / 'rows.jsonl'}", "num_labels=3", f"instructions={tmp_path / 'read.md'}")
    server = start_server(path, 0, "annotators=[anna,ben]", "access_log=true", *arguments)
    try:
        url = f"http://127.0.0.1:{server.port}"
        with httpx.Client(base_url=url, headers={"X-RLHF": "1"}, timeout=TIMEOUT) as client:
            assert client.get(f"/?token={server.token}").status_code == 303
            task = client.post("/api/next", json={}).json()["task"]
            body = {"assignment": task["assignment"], "token": "abcdefgh", "answer": {"kind": "tie"}}
            assert client.post("/api/submit", json=body).status_code == 200
        said = stop(server)
    finally:
        server.process.kill()
        server.process.wait()
    assert "'anna' POST '/api/submit' 200" in said
    assert "Traceback" not in said
    with PreferenceStore.open(path) as store:
        (label,) = store.current_labels(annotators=["anna"])
        screen = store.reconstruct(label.id).screen
        assert (screen.instructions, screen.assignment.page) == ("Read *this*.", page_version())
        assert screen.task.plan.num_labels == 3
    tokens = load_tokens(path, ["anna", "ben"])
    assert server.token == tokens.people["anna"]
    assert not any(token in said for token in (tokens.annotator, tokens.admin, *tokens.people.values()))


class NoServer:
    """Stands for uvicorn where nothing is to be served."""

    def run(self, sockets: list[socket.socket]) -> None:
        assert len(sockets) == 1


def test_the_command_says_what_a_public_address_means(
    store: PreferenceStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(label_command, "make_server", lambda app: NoServer())
    assert run_label([f"store={store.path}", "port=0", "host=0.0.0.0"]) == 0
    shown, said = capsys.readouterr()
    port = shown.partition(f"http://{socket.gethostname()}:")[2].partition("/")[0]
    assert "plain HTTP" in said
    assert f"ssh -N -L {port}:127.0.0.1:{port} " in said
    for argument in ("host=127.0.0.1", "url=https://label.example.org"):
        run_label([f"store={store.path}", "port=0", "host=0.0.0.0", argument])
        shown, said = capsys.readouterr()
        assert said == ""
    assert "https://label.example.org/admin?token=" in shown


def test_the_links_stay_until_new_ones_are_wanted(
    store: PreferenceStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(label_command, "make_server", lambda app: NoServer())
    shown = []
    for argument in ("new_tokens=false", "annotators=[anna]", "new_tokens=true"):
        run_label([f"store={store.path}", "port=0", argument])
        shown.append(re.findall(r"(\S+) +\S+token=(\S+)", capsys.readouterr()[0]))
    (everybody, admin), (anna, same_admin), (new_everybody, new_admin) = shown
    assert [one[0] for one in (everybody, admin, anna)] == ["annotators", "view", "anna"]
    assert admin == same_admin
    assert len({everybody, new_everybody, admin, new_admin}) == 4
