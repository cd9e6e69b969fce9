"""What a request may say: bodies, pictures, uploaded files, URLs, keys and names."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import asking, uri

import dropflow
from dropflow_lab.errors import InputError
from dropflow_lab.inputs.prompts import question_of
from dropflow_lab.serve.api_error import ApiError
from dropflow_lab.serve.chat import read_request
from dropflow_lab.serve.conversation import open_conversation
from dropflow_lab.serve.keys import Keys
from dropflow_lab.serve.limits import Limits
from dropflow_lab.serve.names import Names
from dropflow_lab.serve.uploads import Uploads

PICTURE = Image.new("RGB", (3, 2), (255, 0, 0))
LIMITS = Limits(images=2, pixels=100)


def request(**changed: Any) -> Any:
    return read_request(json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **changed}).encode())


@pytest.mark.parametrize(
    ("changed", "param", "said"),
    [
        ({"messages": []}, "messages", "messages: list should have at least 1 item"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages.0.content.0", "'image_url'"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content", "valid list"),
        ({"model": 7}, "model", "model: input should be a valid string"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"n": 2}, "n", "less than or equal to 1"),
        ({"tools": []}, "tools", "tools: not supported by this server, leave it out"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        ({"logprobs": True}, "logprobs", "False"),
    ],
)
def test_faults_name_their_entry(changed: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(ApiError) as caught:
        request(**changed)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b"9" * 10_000 + b"}", b'{"a":1}' + b" x"],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        read_request(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert len(caught.value.message) < 400


def test_neutral_values_and_nulls_are_taken() -> None:
    read = request(n=1, presence_penalty=0, frequency_penalty=0.0, logprobs=False, user="u", tools=None, stop="x")
    assert (read.stop, read.temperature, read.stream) == (["x"], None, False)
    assert (request(max_tokens=3).asked_tokens, request(max_completion_tokens=4).asked_tokens) == (3, 4)


def opened(parts: Any, uploads: Uploads | None = None, limits: Limits = LIMITS, owner: str = "") -> Any:
    read = request(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    return open_conversation(read.messages, owner, uploads or Uploads(1000, 60), limits)


def fault(parts: Any, **given: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        opened(parts, **given)
    return caught.value


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pictures_are_opened(kind: str) -> None:
    (system, user) = opened(asking(uri(PICTURE, kind), "what ?")[0]["content"])
    assert system == {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    picture = user["content"][0]["image"]
    assert (picture.size, picture.mode) == ((3, 2), "RGB")
    assert picture.getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=3)
    assert question_of([system, user]) == "what ?"


TIFF = uri(PICTURE, "TIFF").replace("image/tiff", "image/png")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "expected a picture as data:image/...;base64,..."),
        ("/etc/passwd", "expected a picture as data:image"),
        ("file:///etc/passwd", "expected a picture as data:image"),
        ("data:text/html;base64,AAAA", "expected a picture as data:image"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64,AAA", "not valid base64"),
        ("data:image/png;base64,AAAA", "3 bytes that cannot be read"),
        (uri(PICTURE)[:-40] + "AAAA", "cannot be read"),
        (TIFF, "expected a PNG, JPEG, WebP or GIF picture"),
        (uri(Image.new("L", (11, 10))), "expected a picture of up to 100 pixels, got 11 x 10"),
        ("http://127.0.0.1/a.png", "does not fetch pictures from 127.0.0.1"),
        ("HTTPS://example.org/a.png", "does not fetch pictures from example.org"),
        ("http://[::1/a.png", "not a URL"),
    ],
)
def test_what_is_no_picture_is_refused(url: str, said: str) -> None:
    error = fault(asking(url, "what ?")[0]["content"])
    assert (error.status, error.param) == (400, "messages.1.content.0")
    assert said in error.message
    assert "0x" not in error.message


def test_too_many_pictures_are_refused_before_any_is_opened() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "broken"}}] * 3
    assert "expected up to 2 pictures in a request, got 3" in fault(parts).message


def test_a_picture_as_a_file_is_its_owners() -> None:
    uploads = Uploads(5000, 60)
    data = base64.b64decode(uri(PICTURE).partition(",")[2])
    mine = uploads.add("me", "a.png", "vision", data)
    part = [{"type": "file", "file": {"file_id": mine.id}}]
    assert opened(part, uploads, owner="me")[1]["content"][0]["image"].size == (3, 2)
    stolen = fault(part, uploads=uploads, owner="you")
    assert (stolen.status, stolen.code) == (404, "no_such_file")
    inline = [{"type": "file", "file": {"file_data": uri(PICTURE), "filename": "a.png"}}]
    assert opened(inline)[1]["content"][0]["image"].size == (3, 2)
    assert "either file_id or file_data" in fault([{"type": "file", "file": {}}]).message
    with pytest.raises(ApiError, match="no file of this id"):
        uploads.delete("you", mine.id)
    uploads.delete("me", mine.id)
    with pytest.raises(ApiError, match="no file of this id"):
        uploads.get("me", mine.id)


def test_uploaded_files_are_bounded_and_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(1024 + 10, 60)
    first = uploads.add("a", "x", "vision", b"12345678")
    with pytest.raises(ApiError) as caught:
        uploads.add("b", "y", "vision", b"123")
    assert (caught.value.status, caught.value.code) == (507, "no_room")
    assert uploads.get("a", first.id) == first  # nobody can push out what is somebody else's
    monkeypatch.setattr("time.time", lambda: first.created + 61)
    uploads.add("b", "y", "vision", b"1234567890")
    with pytest.raises(ApiError, match="or it has expired"):
        uploads.get("a", first.id)


def test_what_is_held_beside_the_content_of_uploaded_files_is_bounded_too() -> None:
    uploads = Uploads(10 * 1024, 60)
    for _ in range(10):
        uploads.add("a", "x", "vision", b"")
    with pytest.raises(ApiError, match="there is no room for 0 more"):
        uploads.add("a", "x", "vision", b"")
    for name, purpose, param in (("x" * 256, "vision", "file"), ("x", "vision" * 100_000, "purpose")):
        with pytest.raises(ApiError, match=f"{param}: expected a name of up to 255 characters") as caught:
            Uploads(10_000, 60).add("a", name, purpose, b"")
        assert (caught.value.status, caught.value.param) == (400, param)


@pytest.fixture
def host() -> Iterator[str]:
    """A web server with a picture, a redirect to it, and what is too long."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/moved" else 200 if self.path != "/none" else 404)
            self.send_header("Location", "/a.png")
            self.end_headers()
            if self.path == "/a.png":
                self.wfile.write(base64.b64decode(uri(PICTURE).partition(",")[2]))
            elif self.path == "/long":
                self.wfile.write(bytes(5000))

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls_are_fetched_from_allowed_hosts_alone(host: str) -> None:
    allowed = Limits(hosts=frozenset({host}), body_bytes=4000)

    def asked(path: str) -> Any:
        return asking(f"http://{host}{path}", "what ?")[0]["content"]

    assert opened(asked("/a.png"), limits=allowed)[1]["content"][0]["image"].size == (3, 2)
    assert "cannot be fetched: HTTP Error 302" in fault(asked("/moved"), limits=allowed).message
    assert "cannot be fetched: HTTP Error 404" in fault(asked("/none"), limits=allowed).message
    assert "is longer than 4,000 bytes" in fault(asked("/long"), limits=allowed).message
    assert "does not fetch" in fault(asked("/a.png")).message
    other = asking(f"http://localhost:{host.split(':')[1]}/a.png", "what ?")[0]["content"]
    assert "does not fetch" in fault(other, limits=allowed).message
    with_user = asking(f"http://{host}@example.org/a.png", "what ?")[0]["content"]
    assert "does not fetch" in fault(with_user, limits=allowed).message


def test_keys_are_read_and_compared(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# two users\nfirst  # of them\n\nsecond\n")
    keys = Keys.read(file, {"DROPFLOW_API_KEY": "third"})
    owners = {keys.owner(f"Bearer {key}") for key in ("first", "second", "third")}
    assert len(owners) == 3
    assert not any(key in str(vars(keys)) for key in ("first", "second", "third"))
    for wrong in ("", "Bearer", "Bearer fourth", "Basic first", "first"):
        with pytest.raises(ApiError) as caught:
            keys.owner(wrong)
        assert caught.value.status == 401
    assert not Keys.read(None, {})
    assert Keys.read(None, {"DROPFLOW_API_KEY": "third\n"}).owner("Bearer third") in owners
    with pytest.raises(InputError, match="DROPFLOW_API_KEY: expected an API key, got only spaces"):
        Keys.read(None, {"DROPFLOW_API_KEY": " "})
    assert Keys([]).owner("") == ""
    file.write_text("# none\n")
    with pytest.raises(InputError, match="expected one API key per line, found none"):
        Keys.read(file, {})


def test_names_stand_for_policies() -> None:
    named = Names.of("m", [dropflow.load_policy(name) for name in ("hidrop-64", "fastv-k2-r50")])
    assert named.all == ["m", "m@hidrop-64", "m@fastv-k2-r50", "m@dense"]
    assert [named.policy(name) for name in named.all] == ["hidrop-64", "hidrop-64", "fastv-k2-r50", "dense"]
    assert Names.of("m", []).policy("m") == "dense"
    for wrong in ("", "m@", "@hidrop-64", "m@hidrop", "other"):
        with pytest.raises(ApiError) as caught:
            named.policy(wrong)
        assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    twice = [dropflow.load_policy("hidrop-64")] * 2
    with pytest.raises(InputError, match="the name 'hidrop-64' is given twice"):
        Names.of("m", twice)
    with pytest.raises(InputError, match="expected a name without '@'"):
        Names.of("m@x", [])
    with pytest.raises(InputError, match="'dense' stands for no policy"):
        Names.of("m", [dropflow.load_policy({"name": "dense", "stages": {}})])
