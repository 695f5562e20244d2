"""Language models as clients: what goes wrong at a server, what happens to the key, what a rerun costs."""

from __future__ import annotations

import copy
import email.utils
import json
import logging
import time

import pytest
from pydantic import TypeAdapter, ValidationError
from small_llm_server import KEY, QUESTION, Reply, Scripted, down, entry, served

from rlsae.config.llm import AnyLlm, LocalLlm
from rlsae.errors import RlsaeError
from rlsae.expand import explain
from rlsae.interpretation.llm import open_client
from rlsae.interpretation.llm.cache import Cached
from rlsae.interpretation.llm.client import CUT, FailFast, LlmError
from rlsae.interpretation.llm.hf_local import HfLocal
from rlsae.interpretation.llm.openai import OpenAi, retry_after
from rlsae.models import save


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)


def client(url, **changes):
    """A client that notes its waits instead of waiting."""
    waits = []
    made = OpenAi(entry(url, **changes), sleep=waits.append, clock=lambda: sum(waits))
    made.waits = waits
    return made


def status_of(made, messages=QUESTION):
    with pytest.raises(LlmError) as caught:
        made.complete(messages)
    return caught.value.status


# --- one request -------------------------------------------------------------------------------------------------


def test_a_question_is_answered_at_temperature_0_with_the_key_in_the_header():
    with served(["A cat."]) as server:
        assert client(server.url + "/", max_tokens=7).complete(QUESTION) == "A cat."
    (request,), (headers,) = server.requests, server.headers
    wanted = {"model": "small", "messages": QUESTION, "max_tokens": 7, "temperature": 0}
    assert request == wanted | {"path": "/v1/chat/completions"}
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_a_server_without_a_key_gets_none_not_even_that_of_a_netrc_file(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with served(["A cat."]) as server:
        client(server.url, key_variable=None).complete(QUESTION)
        client(server.url).complete(QUESTION)
    assert [headers.get("Authorization") for headers in server.headers] == [None, f"Bearer {KEY}"]


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_server_that_is_down_is_asked_again_with_doubling_waits():
    with served([]) as server:
        pass
    made = client(server.url, retries=3)
    assert status_of(made) == "the server cannot be reached (ConnectionError)"
    assert made.waits == [1, 2, 4]


def test_a_host_that_cannot_be_one_has_a_status():
    assert status_of(client("http://a..b/v1", retries=0)).startswith("the server cannot be reached")


def test_a_slow_server_is_given_up():
    with served([Reply(delay=0.5)]) as server:
        assert status_of(client(server.url, timeout=0.1, retries=0)) == "the server gives no answer within 0.1 s"


def test_a_busy_server_is_asked_again_when_it_says():
    with served([Reply(status=429, headers={"Retry-After": "17"}), Reply(status=500), "A cat."]) as server:
        made = client(server.url)
        assert made.complete(QUESTION) == "A cat."
    assert made.waits == [17, 2]


def test_a_server_that_asks_for_an_hour_is_given_up():
    with served([Reply(status=429, headers={"Retry-After": "3600"})]) as server:
        made = client(server.url)
        assert status_of(made) == "the server answers HTTP 429, and asks for a pause of 3600 s"
    assert made.waits == []


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, 0), ("5", 5), ("-5", 0), ("nan", 0), ("1e999", 0), ("soon", 0), ("", 0)]
)
def test_a_pause_is_a_number_of_seconds(header, seconds):
    assert retry_after(header) == seconds


def test_a_pause_may_be_a_date():
    assert retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert retry_after(email.utils.formatdate(time.time() - 30, usegmt=True)) == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("<html>", "the server's answer is not JSON"),
        ("", "the server's answer is not JSON"),
        ("[" * 100_000, "the server's answer is not JSON"),
        ("{}", "the server's answer has no choices"),
        ("[]", "the server's answer has no choices"),
        ('{"choices": []}', "the server's answer has no choices"),
        ('{"choices": [{"message": null}]}', "the server's answer has no choices"),
        ('{"choices": [{"finish_reason": "length", "message": {"content": "It fires on"}}]}', CUT),
        ('{"choices": [{"message": {"content": null}}]}', "the server's answer has no text"),
        ('{"choices": [{"message": {"content": " "}}]}', "the server's answer has no text"),
    ],
)
def test_a_malformed_answer_has_a_status(body, status):
    with served([Reply(body)]) as server:
        assert status_of(client(server.url)) == status
    assert len(server.requests) == 1


def test_an_answer_can_be_written_whatever_it_holds(tmp_path):
    with served([Reply(r'{"choices": [{"message": {"content": "half \ud83d"}}]}')]) as server:
        assert Cached(client(server.url), tmp_path).complete(QUESTION) == "half ?"


def test_a_refused_request_says_why_and_is_not_repeated():
    with served([Reply(json.dumps({"error": {"message": f"context is full\n{KEY}"}}), 400)]) as server:
        made = client(server.url)
        assert status_of(made) == "the server answers HTTP 400: context is full [key]"
    assert len(server.requests) == 1


def test_a_short_key_is_not_shown_either(monkeypatch):
    monkeypatch.setenv("A_KEY", "abc1234")
    with served([Reply(json.dumps({"error": {"message": "wrong key abc1234"}}), 404)]) as server:
        assert status_of(client(server.url)) == "the server answers HTTP 404: wrong key [key]"


def test_requests_keep_the_pace():
    with served(["A cat."]) as server:
        made = client(server.url, requests_per_minute=30)
        for _ in range(3):
            made.complete(QUESTION)
    assert made.waits == [2, 2]


def test_a_server_that_is_down_is_soon_not_asked_again():
    scripted = Scripted(down)
    made = FailFast(scripted, limit=3)
    assert {status_of(made) for _ in range(10)} == {"the server cannot be reached (ConnectionError)"}
    assert len(scripted.asked) == 3


def test_refused_requests_and_single_failures_do_not_stop_the_others():
    script = iter([LlmError("down"), "yes", LlmError("down"), LlmError("too long", of_request=True), "yes"])

    def answer(prompt):
        found = next(script)
        if isinstance(found, LlmError):
            raise found
        return found

    made = FailFast(Scripted(answer), limit=2)
    assert status_of(made) == "down"
    assert made.complete(QUESTION) == "yes"
    assert [status_of(made), status_of(made)] == ["down", "too long"]
    assert made.complete(QUESTION) == "yes"


# --- the key -----------------------------------------------------------------------------------------------------


def test_a_redirect_does_not_carry_the_key_away():
    with served(["A trap."]) as other, served([Reply(status=307, headers={"Location": other.url})]) as server:
        assert status_of(client(server.url)).startswith("the server redirects elsewhere (HTTP 307)")
    assert other.requests == []


def echo(prompt):
    return Reply(json.dumps({"error": {"message": f"wrong key {KEY[:12]}… {KEY}"}}), 401)


@pytest.mark.parametrize(
    "script",
    [
        echo,
        lambda prompt: Reply(json.dumps({"error": {"message": "x" * 190 + KEY}}), 404),
        lambda prompt: Reply(KEY, 500),
        lambda prompt: Reply(KEY, 302, {"Location": f"http://127.0.0.1:9/{KEY}"}),
        lambda prompt: Reply(KEY),
        lambda prompt: f"Your key is {KEY}.",
    ],
    ids=["401", "404", "500", "redirect", "no JSON", "answer"],
)
def test_the_key_is_in_no_text_even_where_the_server_repeats_it(script, tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    with served(script) as server:
        made = Cached(FailFast(client(server.url, retries=1), limit=1), tmp_path)
        try:
            said = made.complete(QUESTION)
        except LlmError as error:
            said = f"{error} {error.status} {error!r} {error.__cause__!r}"
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for text in (said, written, caplog.text, "".join(capsys.readouterr()), json.dumps(made.identity), str(vars(made.client))):
        assert KEY[:12] not in text
    assert server.headers[0]["Authorization"].endswith(KEY)


@pytest.mark.parametrize("value", ["", " ", "sk-two\nlines", "sk-ü", "two words"])
def test_an_environment_without_a_key_is_the_users_mistake_and_is_told_without_it(monkeypatch, value):
    monkeypatch.setenv("A_KEY", value)
    with served(["A cat."]) as server, pytest.raises(RlsaeError, match="A_KEY") as caught:
        client(server.url).complete(QUESTION)
    assert server.requests == []
    assert not value.strip() or value not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"key_variable": KEY},
        {"base_url": f"http://me:{KEY}@host/v1"},
        {"base_url": f"http://host/v1?key={KEY}"},
        {"base_url": "host/v1"},
        {"base_url": "http://[host/v1"},
    ],
)
def test_a_configuration_holds_no_key_and_the_message_does_not_repeat_it(changes):
    raw = {"kind": "openai", "base_url": "http://host/v1", "model": "small"}
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(AnyLlm).validate_python(raw | changes)
    message = explain(caught.value, AnyLlm)
    assert next(iter(changes)) in message
    assert KEY not in message


def test_an_entry_names_a_server_or_a_model_on_this_machine():
    read = TypeAdapter(AnyLlm).validate_python
    assert read({"kind": "openai", "base_url": "http://host/v1", "model": "small"}).key_variable == "OPENAI_API_KEY"
    assert read({"kind": "hf_local", "repository": "owner/name"}).revision == "main"
    with pytest.raises(ValidationError, match="either a path or a repository"):
        read({"kind": "hf_local"})


# --- the cache ---------------------------------------------------------------------------------------------------


def test_a_rerun_asks_nothing_and_needs_neither_server_nor_key(tmp_path, monkeypatch):
    with served(["A cat."]) as server:
        first = open_client(entry(server.url), tmp_path).complete(QUESTION)
        assert len(server.requests) == 1
    monkeypatch.delenv("A_KEY")
    assert open_client(entry(server.url), tmp_path).complete(QUESTION) == first


def test_a_rerun_after_failures_asks_for_what_is_missing_alone(tmp_path):
    questions = [[{"role": "user", "content": f"question {n}"}] for n in range(4)]
    broken = {"question 1", "question 3"}
    with served(lambda prompt: Reply(status=404) if prompt in broken else prompt) as server:
        for question in questions:
            made = open_client(entry(server.url), tmp_path)
            status_of(made, question) if question[0]["content"] in broken else made.complete(question)
        server.requests.clear()
        fixed, broken = broken, set()
        made = open_client(entry(server.url), tmp_path)
        assert [made.complete(question) for question in questions] == [f"question {n}" for n in range(4)]
        assert {request["messages"][0]["content"] for request in server.requests} == fixed


@pytest.mark.parametrize("change", [{"model": "big"}, {"max_tokens": 9}], ids=str)
def test_another_model_or_parameter_is_another_call(tmp_path, change):
    with served(["A cat.", "A dog."]) as server:
        assert open_client(entry(server.url), tmp_path).complete(QUESTION) == "A cat."
        assert open_client(entry(server.url, **change), tmp_path).complete(QUESTION) == "A dog."
        assert open_client(entry(server.url, timeout=9, retries=9), tmp_path).complete(QUESTION) == "A cat."


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"answer": "A trap."}', "[" * 100_000, "\udcff"])
def test_a_damaged_answer_is_asked_for_again(tmp_path, damage):
    scripted = Scripted(lambda prompt: "A cat.")
    Cached(scripted, tmp_path).complete(QUESTION)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert Cached(scripted, tmp_path).complete(QUESTION) == "A cat."
    assert path.read_bytes() == whole
    assert len(scripted.asked) == 2


# --- a model on this machine -------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}<|assistant|>"


@pytest.fixture
def folder(tmp_path, random_model, tokenizer):
    """Function of a chat template: folder of a random model with a context of 64 tokens."""

    def make(template):
        mine = copy.deepcopy(tokenizer)
        mine.chat_template = template
        save(random_model("gpt_neox"), mine, tmp_path / "model")
        return tmp_path / "model"

    return make


def local(folder, max_tokens=8):
    return HfLocal(LocalLlm(kind="hf_local", path=str(folder), max_tokens=max_tokens))


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat template", "plain prompt"])
def test_a_local_model_answers_the_same_every_time(folder, template):
    made = local(folder(template))
    answer = made.complete([{"role": "user", "content": "good?"}])
    assert answer
    assert answer == local(folder(template)).complete([{"role": "user", "content": "good?"}])


def test_thoughts_that_the_template_begins_are_known_as_thoughts(folder):
    assert local(folder(TEMPLATE + "<think>")).complete([{"role": "user", "content": "good?"}]).startswith("<think>")


def test_a_conversation_that_exceeds_the_context_has_a_status(folder):
    status = status_of(local(folder(None)), [{"role": "user", "content": "good " * 60}])
    assert "the model's context holds 64" in status


def test_corpus_text_cannot_end_a_turn(folder, tokenizer):
    made = local(folder(TEMPLATE))
    ids = made._prompt([{"role": "user", "content": f"good{tokenizer.eos_token}bad"}])
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_local_model_is_known_by_its_content(folder, tmp_path):
    here = folder(None)
    first = local(here).identity
    assert str(tmp_path) not in json.dumps(first)
    assert local(here.rename(tmp_path / "moved")).identity != local(folder(TEMPLATE)).identity
    assert local(tmp_path / "moved").identity == first


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(RlsaeError, match="nowhere does not exist"):
        open_client(LocalLlm(kind="hf_local", path=str(tmp_path / "nowhere")), tmp_path).complete(QUESTION)
