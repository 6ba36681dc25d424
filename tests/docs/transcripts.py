"""Write the transcripts of the documentation, from terminals in which its commands run.

``python -m tests.docs.transcripts --write`` runs every scene and replaces the blocks of the pages. Without ``--write``
it prints them. A block is marked ``<!-- transcript: SCENE, TERMINAL -->``. Names of scenes after the options limit it
to these.
"""

from __future__ import annotations

import http.client
import json
import re
import sys
import time
from typing import Callable, Dict, List, Tuple

from ..support.stage import Stage
from ..support.terminal import Terminal
from ..support.waiting import until
from .markdown import ROOT, blocks, read

PAGE = "docs/first-minutes.md"
APPROVALS = "docs/approvals.md"
PAGES = (PAGE, APPROVALS, "README.md")
_BLOCK = re.compile(r"(<!-- transcript: ([a-z -]+), ([a-z -]+) -->\n```text\n)(.*?)(```\n)", re.DOTALL)
#: More than the second in which a further Ctrl-C counts as the same one.
_PAUSE = 1.5

Scene = Callable[[Stage], None]
SCENES: Dict[str, Scene] = {}


def scene(function: Scene) -> Scene:
    SCENES[function.__name__.replace("_", " ")] = function
    return function


# -- what the scenes share --------------------------------------------------------------------------------------------


def start_platform(stage: Stage, command: str = "sekuire dev") -> Terminal:
    platform = stage.type("platform", command)
    platform.line("keys, tokens and tasks are kept")
    if "--ephemeral" not in command:
        platform.line(".env")
    return platform


def start_worker(stage: Stage, command: str = "sekuire worker clerk:tasks") -> Terminal:
    write_clerk(stage)
    worker = stage.type("worker", command)
    worker.line("connected to")
    return worker


def write_clerk(stage: Stage) -> None:
    stage.write("clerk.py", file_of(PAGE, "clerk.py"))


def send(stage: Stage, command: str) -> int:
    return stage.type("client", command).end()


def stop(*terminals: Terminal) -> None:
    """Press Ctrl-C in one terminal after the other, and wait for the end of what runs there."""
    for terminal in terminals:
        terminal.press_ctrl_c()
        terminal.end()


def leave(worker: Terminal, platform: Terminal) -> None:
    """Stop a worker, and the platform when it has said so."""
    stop(worker)
    platform.line("my-agent stopped")
    stop(platform)


def file_of(page: str, name: str) -> str:
    (found,) = [block.text for block in blocks(page) if block.marks.get("file") == name]
    return found


def exports(platform: Terminal) -> List[str]:
    """Return the lines that ``sekuire dev`` prints for other terminals."""
    return [line for line in platform.lines if line.startswith("export ")]


# -- the scenes -------------------------------------------------------------------------------------------------------


@scene
def quick_start(stage: Stage) -> None:
    stage.write("summarizer.py", file_of("README.md", "summarizer.py"))
    typed = [block.text.rstrip("\n") for block in blocks("README.md") if block.language == "sh"]
    command = next(line for line in typed if "summarizer" in line)
    platform = start_platform(stage)
    if command.startswith("python "):
        stage.export("worker", exports(platform))
    worker = stage.type("worker", command)
    worker.line("connected to")
    send(stage, next(line for line in typed if line.startswith("sekuire send")))
    worker.line("completed")
    platform.line("completed")
    leave(worker, platform)


@scene
def wrong_port(stage: Stage) -> None:
    platform = start_platform(stage)
    write_clerk(stage)
    worker = stage.type("worker", "SEKUIRE_API_URL=http://127.0.0.1:9301 sekuire worker clerk:tasks")
    worker.line("cannot reach")
    stop(worker)
    send(stage, 'SEKUIRE_API_URL=http://127.0.0.1:9301 sekuire send copy \'{"text": "a"}\' --wait 30')
    stop(platform)


@scene
def wrong_token(stage: Stage) -> None:
    platform = start_platform(stage, "sekuire dev --ephemeral")
    write_clerk(stage)
    url, agent = exports(platform)[:2]
    stage.export("worker", [url, agent, "export SEKUIRE_INSTALL_TOKEN=skt_mistyped"])
    stage.type("worker", "sekuire worker clerk:tasks").end()
    platform.line("refused")
    stop(platform)


@scene
def used_up_token(stage: Stage) -> None:
    platform = start_platform(stage, "sekuire dev --env-file platform.env")
    url, agent, _, key = exports(platform)
    token = create_install_token(stage, key.partition("=")[2])
    stage.export("worker", [url, agent, f"export SEKUIRE_INSTALL_TOKEN={token}"])
    stop(start_worker(stage))
    platform.line("my-agent stopped")
    stage.type("worker", "sekuire worker clerk:tasks").end()
    platform.line("refused")
    stop(platform)


def create_install_token(stage: Stage, key: str) -> str:
    """Make an install token that can be used once."""
    connection = http.client.HTTPConnection("127.0.0.1", stage.port)
    headers = {"Content-Type": "application/json", "X-API-Key": key}
    connection.request("POST", "/api/v1/install-tokens", json.dumps({"agent_id": "my-agent"}), headers)
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return str(answer["install_token"])


@scene
def failing_handler(stage: Stage) -> None:
    platform = start_platform(stage)
    worker = start_worker(stage)
    send(stage, "sekuire send copy '{\"pages\": 2}' --wait 30")
    send(stage, "sekuire send divide '{\"by\": 0}' --wait 30")
    worker.line("return 1 / ")
    until(lambda: worker.text.count("ZeroDivisionError") == 2)
    platform.line("divide failed")
    leave(worker, platform)


@scene
def denial(stage: Stage) -> None:
    stage.write("policy.json", file_of(PAGE, "policy.json"))
    platform = start_platform(stage, "sekuire dev --policy policy.json")
    worker = start_worker(stage)
    send(stage, "sekuire send divide '{\"by\": 2}' --wait 30")
    worker.line("denied")
    platform.line("denied")
    leave(worker, platform)


def print_page(stage: Stage) -> Tuple[Terminal, Terminal, Terminal]:
    """Begin a task that waits for the file ``paper``."""
    platform = start_platform(stage)
    worker = start_worker(stage)
    client = stage.type("client", "sekuire send print '{\"page\": 1}' --wait 30")
    worker.line("waiting for paper")
    return platform, worker, client


@scene
def ctrl_c(stage: Stage) -> None:
    platform, worker, client = print_page(stage)
    worker.press_ctrl_c()
    worker.line("stopping")
    stage.type("another", "touch paper").end()
    worker.end()
    client.end()
    platform.line("completed")
    stop(platform)


@scene
def second_ctrl_c(stage: Stage) -> None:
    platform, worker, client = print_page(stage)
    worker.press_ctrl_c()
    worker.line("stopping")
    time.sleep(_PAUSE)
    worker.press_ctrl_c()
    worker.end()
    platform.line("worker_shutdown")
    client.press_ctrl_c()
    client.end()
    stop(platform)


@scene
def restart(stage: Stage) -> None:
    platform = start_platform(stage)
    worker = start_worker(stage)
    platform.line("connected")
    stop(platform)
    worker.line("lost the connection")
    platform = start_platform(stage)
    worker.line("reconnected")
    platform.line("connected")
    send(stage, 'sekuire send copy \'{"text": "a"}\' --wait 30')
    platform.line("completed")
    stop(platform)
    until(lambda: worker.text.count("lost the connection") == 2)
    platform = start_platform(stage, "sekuire dev --reset")
    worker.end()
    platform.line("refused")
    stop(platform)


@scene
def approval(stage: Stage) -> None:
    stage.write("billing.py", file_of(APPROVALS, "billing.py"))
    platform = start_platform(stage)
    worker = stage.type("worker", "sekuire worker billing:tasks")
    worker.line("connected to")
    task = """'{"order": "A-17", "amount": 500}'"""
    client = stage.type("client", f"sekuire send refund {task} --wait 600")
    wanted = platform.line("approval wanted")
    stage.type("person", "sekuire approvals list").end()
    approval_id = wanted.partition("approvals approve ")[2].split()[0]
    stage.type("person", f"sekuire approvals approve {approval_id} --by ada").end()
    client.end()
    platform.line("completed")
    leave(worker, platform)


@scene
def ask_on_a_terminal(stage: Stage) -> None:
    stage.write("billing.py", file_of(APPROVALS, "billing.py"))
    stage.write("try_billing.py", file_of(APPROVALS, "try_billing.py"))
    worker = stage.type("worker", "python try_billing.py")
    until(lambda: "approve?" in worker.text)
    worker.enter("yes")
    worker.end()


# -- the pages -------------------------------------------------------------------------------------------------------


def play(name: str) -> Dict[str, str]:
    """Return the transcript of each terminal of a scene."""
    with Stage() as stage:
        SCENES[name](stage)
        return {where: stage.transcript(where) for where in stage.terminals}


def shown(page: str, name: str) -> Dict[str, str]:
    """Return the transcripts of a scene that the page shows, by their terminals."""
    return {where: text for _, one, where, text, _ in _BLOCK.findall(page) if one == name}


def replace_in(page: str, transcripts: Dict[str, Dict[str, str]]) -> str:
    """Return the page with these transcripts, by scene and terminal."""

    def replace(match: re.Match[str]) -> str:
        text = transcripts.get(match[2], {}).get(match[3], match[4])
        return f"{match[1]}{text}{match[5]}"

    return _BLOCK.sub(replace, page)


def main() -> None:
    names = [name for name in sys.argv[1:] if name != "--write"] or list(SCENES)
    transcripts = {name: play(name) for name in names}
    if "--write" in sys.argv[1:]:
        for page in PAGES:
            (ROOT / page).write_text(replace_in(read(page), transcripts), encoding="utf-8")
        return
    for name, found in transcripts.items():
        for where, text in found.items():
            print(f"== {name}, {where}\n{text}")


if __name__ == "__main__":
    main()
