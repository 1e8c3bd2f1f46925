"""Pictures in a browser: headless Chromium, driven by its own protocol over a pipe, without a library.

Skipped where there is no browser. What is asked of it is what a person does: open the page, press a key, look.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import modelspec
from modelspec.picture import comparison, figure, page

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on this machine"
)

Message = dict[str, Any]


class Browser:
    """One page of a browser: `ask` sends a command and waits for its answer; what happens meanwhile is kept."""

    def __init__(self, sender: int, receiver: int) -> None:
        self._send, self._receive = sender, receiver
        self._numbers, self._rest, self._session = count(1), b"", ""
        self.events: list[Message] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> Message:
        """The answer to a command."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        command = json.dumps({"id": number, "method": method, "params": parameters} | session)
        os.write(self._send, command.encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == number:
                assert "error" not in message, message
                result: Message = message["result"]
                return result
            self.events.append(message)

    def open(self, file: Path) -> None:
        """Opens a file and waits until it is loaded."""
        self.events.clear()
        self.ask("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """What an expression is in the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if kind == "keyDown" and text else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def complaints(self) -> list[Message]:
        """What the console holds, and requests for anything but the file itself."""
        found = []
        for event in self.events:
            match event.get("method"):
                case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded":
                    found.append(event)
                case "Network.requestWillBeSent" if not event["params"]["request"]["url"].startswith("file:"):
                    found.append(event)
        return found

    def _next(self) -> Message:
        while b"\0" not in self._rest:
            piece = os.read(self._receive, 65536)
            assert piece, "the browser closed the pipe"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        found: Message = json.loads(message)
        return found


# The browser reads commands from descriptor 3 and writes answers to 4.
PLACE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser with a profile of its own."""
    assert BROWSER is not None
    ends = [end for pair in (os.pipe(), os.pipe()) for end in pair]
    # Above 4, so that putting them in their places overwrites none of them.
    commands, sender, receiver, answers = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    process = subprocess.Popen(
        [sys.executable, "-c", PLACE, str(commands), str(answers), BROWSER, *SWITCHES, profile],
        pass_fds=(commands, answers),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands)
    os.close(answers)
    try:
        yield Browser(sender, receiver)
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(sender)
        os.close(receiver)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures as files."""
    old, new = (modelspec.load(str(ROOT / "specs" / f"deepseek-{name}.yaml")) for name in ("v2", "v3"))
    hybrid = modelspec.load(str(ROOT / "specs" / "qwen3-next-80b-a3b.yaml"))
    folder = tmp_path_factory.mktemp("pictures")
    texts = {
        "page.html": page(new),
        "hybrid.html": page(hybrid),
        "diff.html": comparison(old, new),
        "figure.svg": figure(new),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {name: folder / name for name in texts}


@pytest.mark.parametrize("name", ["page.html", "hybrid.html", "diff.html", "figure.svg"])
def test_it_opens_without_a_word_in_the_console_and_without_a_request(
    browser: Browser, files: dict[str, Path], name: str
) -> None:
    browser.open(files[name])
    assert browser.value("document.documentElement.getBoundingClientRect().height") > 500
    assert browser.complaints() == []


@pytest.mark.parametrize("name", ["page.html", "diff.html"])
def test_a_block_opens_by_the_keyboard_and_shows_what_it_holds(
    browser: Browser, files: dict[str, Path], name: str
) -> None:
    browser.open(files[name])
    closed = "document.querySelector('details:not([open])')"
    browser.value(f"window.block = {closed}; block.querySelector('summary').focus(); 1")
    before = browser.value("block.getBoundingClientRect().height")
    browser.press("Enter", 13, "\r")
    assert browser.value("block.open")
    assert browser.value("block.getBoundingClientRect().height") > before + 50
    browser.press("Enter", 13, "\r")
    assert not browser.value("block.open")


def test_the_tab_key_reaches_a_block_and_the_focus_is_seen(browser: Browser, files: dict[str, Path]) -> None:
    browser.open(files["page.html"])
    for _ in range(10):
        browser.press("Tab", 9)
        if browser.value("document.activeElement.tagName") == "SUMMARY":
            break
    assert browser.value("document.activeElement.tagName") == "SUMMARY"
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("name", ["page.html", "diff.html", "figure.svg"])
def test_it_follows_the_theme(browser: Browser, files: dict[str, Path], name: str) -> None:
    element, colour = ("rect", "fill") if name.endswith("svg") else ("body", "backgroundColor")
    ground = f"getComputedStyle(document.querySelector('{element}')).{colour}"
    found = []
    for theme in ("light", "dark"):
        browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        browser.open(files[name])
        found.append(browser.value(ground))
    assert found == ["rgb(255, 255, 255)", "rgb(18, 22, 29)"]


@pytest.mark.parametrize("name", ["page.html", "hybrid.html", "diff.html"])
def test_a_narrow_screen_needs_no_sideways_scrolling(browser: Browser, files: dict[str, Path], name: str) -> None:
    browser.ask("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=False)
    browser.open(files[name])
    browser.value("for (const each of document.querySelectorAll('details')) each.open = true")
    assert browser.value("document.documentElement.scrollWidth") <= 360
    browser.ask("Emulation.clearDeviceMetricsOverride")


def test_a_screen_reader_is_told_names_of_drawings_and_tables(browser: Browser, files: dict[str, Path]) -> None:
    browser.open(files["page.html"])
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
    ]
    drawings = [name for role, name in named if role in ("image", "img")]
    assert any("3 × mla + dense, then 58 × mla + moe" in name for name in drawings)
    assert any("8 of 256 experts" in name for name in drawings)
    assert ("table", "Tensors of mla") in named
    assert all(name for role, name in named if role in ("image", "img", "table", "heading", "DisclosureTriangle"))


def test_every_text_of_the_figure_stays_inside_of_it(browser: Browser, files: dict[str, Path]) -> None:
    browser.open(files["figure.svg"])
    outside = """[...document.querySelectorAll('text')].filter(each => {
        const box = each.getBoundingClientRect(); return box.left < 0 || box.right > 960 - 20
    }).map(each => each.textContent)"""
    assert browser.value(outside) == []
