"""The server as clients see it: right answers, clear errors, nothing of one user for another, clean ends."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice, product
from typing import Any

import pytest
from PIL import Image
from serving import Started, asking, messages, uri

from dropflow_lab.inputs.data import Sample

for needed in ("starlette", "uvicorn", "python_multipart", "prometheus_client"):
    pytest.importorskip(needed, reason=f"{needed} is of the extra `serve`")
openai = pytest.importorskip("openai", reason="openai is of the extra `dev`")

HELLO = [{"role": "user", "content": "what digit is yellow ?"}]
JSON = {"Content-Type": "application/json"}
BODY = json.dumps({"model": "digits", "messages": HELLO})
LONG = "read all digits from left to right"


def metric(served: Started, name: str) -> float:
    """The value of a metric, summed over its labels."""
    lines = [
        line for line in served.raw("GET", "/metrics")[1].splitlines() if line.startswith((f"{name} ", f"{name}{{"))
    ]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def until(true: Any) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it did not become true within 30 seconds"
        time.sleep(0.02)


def test_answers_are_those_of_the_model_alone_whatever_they_are_batched_with(
    served: Started, samples: list[Sample], alone: dict[str, list[str]]
) -> None:
    batches = metric(served, "dropflow_batch_size_count")
    asked = [(name, n) for n, name in product(range(len(samples)), alone)]
    with ThreadPoolExecutor(24) as clients:
        said = list(clients.map(lambda one: served.ask(one[0], messages(samples[one[1]])), asked))
    assert said == [alone[name][n] for name, n in asked]
    assert len(set(said)) > 5
    assert metric(served, "dropflow_batch_size_count") - batches < len(asked) / 2


def test_streams_are_the_same_answers_in_pieces(
    served: Started, samples: list[Sample], alone: dict[str, list[str]]
) -> None:
    def streamed(one: tuple[str, int]) -> list[Any]:
        name, n = one
        of: Any = served.openai.chat.completions.create(
            model=name, messages=messages(samples[n]), stream=True, stream_options={"include_usage": True}
        )
        return list(of)

    asked = [(name, n) for n in range(8) for name in alone]
    with ThreadPoolExecutor(24) as clients:
        chunks = list(clients.map(streamed, asked))
    for (name, n), got in zip(asked, chunks, strict=True):
        *told, usage = got
        texts = [chunk.choices[0].delta.content or "" for chunk in told]
        assert "".join(texts) == alone[name][n]
        assert sum(map(bool, texts)) == usage.usage.completion_tokens - 1  # one is the end token
        assert [chunk.choices[0].finish_reason for chunk in told] == [None] * (len(told) - 1) + ["stop"]
        assert told[0].choices[0].delta.role == "assistant"
        assert {chunk.id for chunk in got} == {told[0].id}
        assert {chunk.model for chunk in got} == {name}


def test_a_conversation_and_its_usage(served: Started, samples: list[Sample]) -> None:
    first = messages(samples[0])
    more = [*first, {"role": "assistant", "content": "7"}, {"role": "user", "content": "what digit is yellow ?"}]
    one, two = (served.openai.chat.completions.create(model="digits@dense", messages=of) for of in (first, more))
    words = len(samples[0].question.split())
    assert one.usage.prompt_tokens == 1 + 2 + 144 + words + 2  # <s> user : picture, question, assistant :
    assert two.usage.prompt_tokens == one.usage.prompt_tokens + 2 + 2 + 5 + 2
    assert one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens
    assert two.choices[0].message.content


def test_lengths_and_stop_texts_end_an_answer(served: Started, samples: list[Sample]) -> None:
    (picture,) = samples[0].images()
    of = asking(uri(picture), LONG)
    whole = served.ask("digits@dense", of)
    words = whole.split()
    assert len(words) > 3
    done = served.openai.chat.completions.create(model="digits@dense", messages=of, max_tokens=2)
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == (" ".join(words[:2]), "length")
    assert done.usage.completion_tokens == 2
    stop = served.openai.chat.completions.create(model="digits@dense", messages=of, stop=" ".join(words[1:3]))
    assert (stop.choices[0].message.content, stop.choices[0].finish_reason) == (f"{words[0]} ", "stop")


def test_sampling_follows_the_seed_whatever_it_is_batched_with(served: Started) -> None:
    def drawn(seed: int) -> str:
        return served.ask("digits@dense", HELLO, temperature=2.0, seed=seed, max_tokens=12)

    alone = [drawn(seed) for seed in range(4)]
    assert len(set(alone)) > 2
    with ThreadPoolExecutor(9) as clients:
        greedy = clients.submit(served.ask, "digits@dense", HELLO)
        assert list(clients.map(drawn, [0, 1, 2, 3, 0, 1, 2, 3])) == alone * 2
        assert greedy.result() == served.ask("digits@dense", HELLO)


def test_models_are_listed_with_their_policies(served: Started) -> None:
    listed = served.openai.models.list().data
    assert [model.id for model in listed] == [
        "digits", "digits@mustdrop-digits", "digits@digits-mild", "digits@dense",
    ]  # fmt: skip
    assert [model.policy for model in listed] == ["mustdrop-digits", "mustdrop-digits", "digits-mild", "dense"]
    assert served.openai.models.retrieve("digits@dense").policy == "dense"
    with pytest.raises(openai.NotFoundError, match="did you mean 'digits@dense'"):
        served.openai.models.retrieve("digits@dence")


def test_uploaded_pictures_are_answered_like_inline_ones(
    served: Started, samples: list[Sample], alone: dict[str, list[str]]
) -> None:
    import base64

    (picture,) = samples[0].images()
    data = base64.b64decode(uri(picture).partition(",")[2])
    file = served.openai.files.create(file=("scene.png", data), purpose="vision")
    assert (file.bytes, file.filename, file.purpose) == (len(data), "scene.png", "vision")
    assert served.openai.files.retrieve(file.id).id == file.id
    of = asking("", samples[0].question)
    of[0]["content"][0] = {"type": "file", "file": {"file_id": file.id}}
    assert served.ask("digits@dense", of) == alone["digits@dense"][0]
    assert served.openai.files.delete(file.id).deleted
    error = served.refused(model="digits", messages=of)
    assert (error.status_code, error.code) == (404, "no_such_file")
    status, told = served.raw("POST", "/v1/files", b"x", {"Content-Type": "multipart/form-data; boundary=y"})
    assert (status, told["error"]["code"]) == (400, "invalid_form")
    assert served.raw("POST", "/v1/files", BODY, JSON)[0] == 400
    assert served.raw("GET", "/v1/files")[0] == 405


@pytest.mark.parametrize(
    ("changed", "status", "code", "said"),
    [
        ({"model": "digits@mustdrop"}, 404, "model_not_found", "did you mean 'digits@mustdrop-digits'"),
        ({"max_tokens": 65}, 400, "context_length_exceeded", "expected up to 64, got 65: answers have up to 64 tokens"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, 400, "context_length_exceeded", "than 512 tokens"),
        ({"messages": [{"role": "user", "content": "a" * 40_000}]}, 400, "context_length_exceeded", "characters"),
        ({"messages": [{"role": "user", "content": "an <image>"}]}, 400, "invalid_value", "stands for a picture"),
        ({"temperature": 9}, 400, "invalid_value", "temperature: input should be less than or equal to 2"),
        ({"messages": asking(uri(Image.new("L", (600, 600))), "?")}, 400, "invalid_image", "up to 250,000 pixels"),
        ({"messages": asking("data:image/png;base64,AAAA", "?")}, 400, "invalid_image", "cannot be read"),
        ({"messages": asking("https://example.org/a.png", "?")}, 400, "url_not_allowed", "does not fetch"),
    ],
)
def test_bad_requests_are_refused_in_one_line(
    served: Started, changed: dict[str, Any], status: int, code: str, said: str
) -> None:
    error = served.refused(**({"model": "digits", "messages": HELLO} | changed))
    assert (error.status_code, error.code) == (status, code)
    assert said in error.body["message"]
    assert "\n" not in error.body["message"]


def test_a_length_that_does_not_fit_beside_the_prompt_is_refused(served: Started) -> None:
    long = [{"role": "user", "content": "is " * 470}]
    assert served.refused(model="digits", messages=long, max_tokens=60).code == "context_length_exceeded"
    done = served.openai.chat.completions.create(model="digits", messages=long)
    assert done.usage.total_tokens <= 512


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"\xff" * 100, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b" " * 2_000_001, 413, "request_too_large"),
        ("POST", "/v1/chat/completions", b" " * 20_000_000, 413, "request_too_large"),
        ("GET", "/v1/chat/completions", None, 405, "no_such_route"),
        ("GET", "/v2", None, 404, "no_such_route"),
    ],
)
def test_what_is_not_the_api_is_refused(
    served: Started, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    told = served.raw(method, path, body)
    assert (told[0], told[1]["error"]["code"]) == (status, code)


def test_text_that_is_no_unicode_is_refused_or_answered_but_breaks_nothing(served: Started) -> None:
    body = '{"model": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}'
    assert served.raw("POST", "/v1/chat/completions", body, JSON)[0] == 404
    status, told = served.raw("POST", "/v1/chat/completions", body.replace("\\ud800", "digits", 1), JSON)
    assert status == 400
    assert "processor refuses" in told["error"]["message"]
    assert served.ask("digits@dense", HELLO)


def test_a_body_without_a_told_length_is_bounded_too(served: Started) -> None:
    with served.socket() as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
        connection.sendall(b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while b'{"status":"ok"}' not in answer:  # what was too long is dropped, and the connection stays usable
            answer += connection.recv(1000)


def test_slow_bodies_end_with_an_error(start: Any) -> None:
    with start(body_seconds=0.3, policies=()) as slow:
        with slow.socket() as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"did not arrive within 0.3 seconds" in answer
        assert slow.ask("digits", HELLO)


class Held:
    """Keeps a server's model from answering until it is let go."""

    def __init__(self, served: Started, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        answers = served.server._service.worker._answers
        real = answers.answer

        def answer(batch: Any) -> None:
            self.go.wait(30)
            real(batch)

        monkeypatch.setattr(answers, "answer", answer)


def test_only_a_few_requests_have_their_pictures_open_at_once(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of a few kB may hold pictures of many megapixels."""
    from dropflow_lab.serve import service

    counted, lock = {"open": 0, "most": 0}, threading.Lock()

    def counting(change: int, seconds: float, real: Any) -> Any:
        def call(*given: Any) -> Any:
            with lock:
                counted["open"] += change
                counted["most"] = max(counted["most"], counted["open"])
            time.sleep(seconds)
            return real(*given)

        return call

    with start(policies=()) as many:
        for name, change, seconds in (("open_conversation", 1, 0.0), ("prepare", -1, 0.05)):
            place = f"dropflow_lab.serve.service.{name}"
            monkeypatch.setattr(place, counting(change, seconds, getattr(service, name)))
        with ThreadPoolExecutor(16) as clients:
            said = list(clients.map(lambda _: many.ask("digits", HELLO), range(16)))
    assert len(said) == 16
    assert (counted["open"], counted["most"] <= 5) == (0, True)  # four, and the one that is being prepared


def test_slow_answers_and_a_full_server_end_with_an_error(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(seconds=4.0, queue=3, batch=1, policies=()) as busy:
        held = Held(busy, monkeypatch)
        with ThreadPoolExecutor(4) as clients:
            waiting = [clients.submit(busy.refused, model="digits", messages=HELLO) for _ in range(3)]
            until(lambda: metric(busy, "dropflow_requests_inside") == 3)
            full = busy.refused(model="digits", messages=HELLO, user="long" * 500_000)
            late = [one.result() for one in waiting]
        assert (full.status_code, full.code, full.response.headers["retry-after"]) == (503, "overloaded", "1")
        assert [(error.status_code, error.code) for error in late] == [(504, "timeout")] * 3
        held.go.set()
        assert busy.ask("digits", HELLO)
        assert metric(busy, "dropflow_requests_inside") == metric(busy, "dropflow_requests_waiting") == 0


def test_a_stream_that_takes_too_long_ends_with_an_error(
    start: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    (picture,) = samples[0].images()
    with start(seconds=4.0, policies=()) as slow:
        answers = slow.server._service.worker._answers
        decode = answers._decode
        monkeypatch.setattr(answers, "_decode", lambda tokens: (time.sleep(0.5), decode(tokens))[1])
        stream = slow.openai.chat.completions.create(model="digits", messages=asking(uri(picture), LONG), stream=True)
        assert next(stream).choices[0].delta.role == "assistant"
        with pytest.raises(openai.APIError, match=r"not finished within 4 seconds"):
            list(stream)


def test_when_a_client_leaves_its_answer_ends(served: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    decode = served.server._service.worker._answers._decode

    def slowly(tokens: Any) -> str:
        steps.append(len(tokens))
        time.sleep(0.05)
        return str(decode(tokens))

    monkeypatch.setattr(served.server._service.worker._answers, "_decode", slowly)
    options = {"temperature": 2.0, "seed": 3, "max_tokens": 64}
    left = metric(served, 'dropflow_requests_total{model="digits@dense",status="499"}')
    body = json.dumps({"model": "digits@dense", "messages": HELLO, "stream": True, **options})
    for body_of in (body, body.replace("true", "false")):
        with served.socket() as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body_of)}\r\n\r\n"
            steps.clear()
            connection.sendall((head + body_of).encode())
            until(lambda: len(steps) > 3)
        until(lambda: metric(served, "dropflow_requests_inside") == 0)
    assert metric(served, 'dropflow_requests_total{model="digits@dense",status="499"}') == left + 2
    seen = len(steps)
    time.sleep(0.3)
    assert len(steps) <= seen + 4


def test_keys_shut_others_out_and_keep_files_apart(start: Any) -> None:
    with start(keys=("one", "two"), policies=()) as locked:
        first, second, other = (locked.client(key) for key in ("one", "two", "three"))
        assert first.chat.completions.create(model="digits", messages=HELLO).choices
        file = first.files.create(file=("a.png", b"data"), purpose="vision")
        with pytest.raises(openai.NotFoundError):
            second.files.retrieve(file.id)
        with pytest.raises(openai.NotFoundError):
            second.files.delete(file.id)
        assert first.files.retrieve(file.id).bytes == 4
        for ask in (
            lambda: other.chat.completions.create(model="digits", messages=HELLO),
            lambda: other.files.retrieve(file.id),
            lambda: other.models.list(),
            lambda: other.models.retrieve("digits"),
            lambda: other.files.create(file=("a.png", b"data"), purpose="vision"),
        ):
            with pytest.raises(openai.AuthenticationError) as caught:
                ask()
            assert caught.value.code == "invalid_api_key"
        assert locked.raw("GET", "/metrics")[0] == 401
        assert locked.raw("GET", "/health") == (200, {"status": "ok"})


def test_metrics_count_what_was_done(start: Any, samples: list[Sample]) -> None:
    with start() as counted:
        done = counted.openai.chat.completions.create(model="digits@dense", messages=messages(samples[0]))
        counted.refused(model="other", messages=HELLO)
        assert metric(counted, 'dropflow_requests_total{model="digits@dense",status="200"}') == 1
        assert metric(counted, 'dropflow_requests_total{model="",status="404"}') == 1
        assert metric(counted, "dropflow_prompt_tokens_total") == done.usage.prompt_tokens
        assert metric(counted, "dropflow_answer_tokens_total") == done.usage.completion_tokens
        assert metric(counted, "dropflow_time_to_first_token_seconds_count") == 1
        assert metric(counted, 'dropflow_batch_size_bucket{le="1.0",model="digits@dense"}') == 1
        assert metric(counted, "process_resident_memory_bytes") > 1e6


@pytest.mark.parametrize(("grace", "status"), [(30.0, 200), (0.2, 503)])
def test_a_stop_lets_answers_finish_for_a_while(
    start: Any, monkeypatch: pytest.MonkeyPatch, grace: float, status: int
) -> None:
    with start(grace=grace, policies=()) as stopped, ThreadPoolExecutor(1) as client:
        held = Held(stopped, monkeypatch)
        answer = client.submit(stopped.raw, "POST", "/v1/chat/completions", BODY, JSON)
        until(lambda: metric(stopped, "dropflow_requests_inside") == 1)
        stopped.server.stop()
        if status == 200:
            time.sleep(0.3)
            held.go.set()
        got, told = answer.result()
        held.go.set()
        assert got == status
        if status == 503:
            assert told["error"]["code"] == "stopping"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("requests", "growth"), [(64, None), pytest.param(1000, 64 * 2**20, marks=pytest.mark.slow)])
def test_32_clients_get_their_own_answers_and_memory_stays_flat(
    start: Any, samples: list[Sample], alone: dict[str, list[str]], requests: int, growth: int | None
) -> None:
    # clients and server are one process here, which was seen to move by more than 24 MiB without a leak
    with start(queue=64, prefix_bytes=4 * 2**20) as many:
        asked = list(islice(cycle(product(alone, range(len(samples)))), requests))
        prepared = {n: messages(sample) for n, sample in enumerate(samples)}

        def ask(one: tuple[int, tuple[str, int]]) -> str:
            order, (name, n) = one
            if order % 3:
                return many.ask(name, prepared[n])
            stream: Any = many.openai.chat.completions.create(model=name, messages=prepared[n], stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        with ThreadPoolExecutor(32) as clients:
            warm = requests // 4
            said = list(clients.map(ask, enumerate(asked[:warm])))
            before = metric(many, "process_resident_memory_bytes")
            said += list(clients.map(ask, enumerate(asked[warm:], warm)))
        assert said == [alone[name][n] for name, n in asked]
        ok = sum(metric(many, f'dropflow_requests_total{{model="{name}",status="200"}}') for name in alone)
        assert ok == metric(many, "dropflow_requests_total") == requests
        if growth is not None:
            assert metric(many, "process_resident_memory_bytes") - before < growth
