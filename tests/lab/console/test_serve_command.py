"""`dropflow serve` as a program: it says where it is, ends cleanly, and starts again after a kill."""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from documents import blocks

from dropflow_lab.digits.checkpoints.model import sample_image

for needed in ("starlette", "uvicorn", "python_multipart", "prometheus_client"):
    pytest.importorskip(needed, reason=f"{needed} is of the extra `serve`")
openai = pytest.importorskip("openai", reason="openai is of the extra `dev`")


@contextmanager
def running(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], int, list[str]]]:
    """The program, its port and the lines it has printed; killed at the end."""
    command = [sys.executable, "-m", "dropflow", "serve", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        found = re.search(r"at http://127\.0\.0\.1:(\d+)/v1$", lines[1])
        assert found, process.stderr.read()
        yield process, int(found[1]), lines
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def client(port: int) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.mark.parametrize("option", ["--wait", "--timeout", "--body-timeout", "--grace"])
def test_times_without_an_end_are_refused(refused: Callable[..., str], option: str) -> None:
    assert f"Invalid value for '{option}'" in refused("serve", "--port", 0, option, "inf")


HELLO: Any = [{"role": "user", "content": "what digit is yellow ?"}]


def test_it_serves_the_page_of_the_documents_and_ends_on_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample_image().save("picture.png")
    with running("hidrop", "--port", 0) as (process, port, lines):
        assert lines[0] == "serving hidrop, hidrop@hidrop-digits, hidrop@dense\n"
        python, shell = blocks("docs/serve.md", "python"), blocks("docs/serve.md", "sh")
        known: dict[str, Any] = {}
        for block in python:
            exec(block.text.replace(":8000", f":{port}"), known)
        assert known["answer"].choices[0].message.content == "8"
        assert known["streamed"] == known["uploaded"].choices[0].message.content == "8"
        (curl,) = [block.text for block in shell if "curl" in block.text]
        if shutil.which("curl"):
            text = curl.replace(":8000", f":{port}")
            told = subprocess.run(["sh", "-e", "-c", text], capture_output=True, text=True, check=True, timeout=60)
            assert '"content":"8"' in told.stdout
        answers: list[str] = []
        ended: list[tuple[int, str]] = []

        def ask() -> None:
            for _ in range(1000):
                try:
                    done = client(port).chat.completions.create(model="hidrop@dense", messages=HELLO)
                except openai.APIConnectionError:  # nobody listens any more
                    return
                except openai.InternalServerError as error:  # its connection was accepted just before the stop
                    ended.append((error.status_code, error.code))
                    return
                answers.append(done.choices[0].finish_reason)

        asking = threading.Thread(target=ask)
        asking.start()
        while len(answers) < 3:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        asking.join()
        assert set(answers) == {"stop"}
        assert set(ended) <= {(503, "stopping")}
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.slow
def test_it_starts_again_after_a_kill() -> None:
    with running("hidrop", "--port", 0) as (process, port, _):
        assert client(port).chat.completions.create(model="hidrop@dense", messages=HELLO).choices
        process.kill()
        assert process.wait() == -signal.SIGKILL
    with running("hidrop", "--port", port, "--name", "again") as (process, again, lines):
        assert again == port
        assert lines[0].startswith("serving again, again@hidrop-digits")
        assert client(port).chat.completions.create(model="again@dense", messages=HELLO).choices


@pytest.mark.slow
def test_an_interrupt_ends_it_too() -> None:
    with running("--port", 0, "--policy", "digits-mild", "--policy", "mustdrop-digits") as (process, port, lines):
        assert lines[0] == "serving digits, digits@digits-mild, digits@mustdrop-digits, digits@dense\n"
        assert port > 0
        process.send_signal(signal.SIGINT)  # at once, maybe before uvicorn has begun to handle signals
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_what_cannot_be_served_is_refused_in_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in refused("serve", "--port", port)
    assert "config.json" in refused("serve", tmp_path / "nothing")
    assert "hidrop-64" in refused("serve", "--port", 0, "--policy", "hidrop-46")
    assert "rescale" in refused("serve", "--port", 0, "--policy", "hidrop-64")
    assert "given twice" in refused("serve", "--port", 0, "--policy", "digits-mild", "--policy", "digits-mild")
    (tmp_path / "keys").write_text("")
    assert "expected one API key per line" in refused("serve", "--port", 0, "--api-keys", tmp_path / "keys")
    assert "--name" in refused("serve", "--port", 0, "--name", "a@b")


def test_without_the_extra_it_says_what_to_install(refused: Callable[..., str], monkeypatch: Any) -> None:
    monkeypatch.setattr("dropflow_lab.console.commands.serve.find_spec", lambda name: name != "uvicorn" or None)
    assert refused("serve") == "error: the server needs uvicorn: pip install 'dropflow[serve]'"
    assert refused("bench", "serve") == "error: the server needs uvicorn: pip install 'dropflow[serve]'"
    assert importlib.util.find_spec("uvicorn") is not None
