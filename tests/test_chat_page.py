"""The chat page: one file that asks nobody but its server, and in a real browser does what it shows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import nanovllm.server
from nanovllm import AsyncLLM

PAGE = Path(nanovllm.server.__file__).parent / "static" / "index.html"
MODULES = ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai")


def test_the_page_asks_nobody_else():
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"^\s*// .*$", "", text, flags=re.MULTILINE))
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?!data:)", text)
    assert "innerHTML" not in text, "what a model writes is text"


@pytest.fixture(scope="module")
def page():
    """The page in Chromium, with the demo behind it."""
    for module in MODULES:
        pytest.importorskip(module, reason=f"needs {module}, which the extra [test] brings")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser: playwright is not installed")
    from servers import DEMO, OPTIONS, serving

    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        except playwright.Error as error:
            if "Executable doesn't exist" not in str(error):
                raise
            pytest.skip(f"needs a browser, by `playwright install chromium` or the system's package: {error}")
        engine = AsyncLLM(str(DEMO), **OPTIONS)
        with serving(engine) as url:
            page = browser.new_page()
            page.errors = []
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.goto(url)
            yield page
            browser.close()
        engine.close()
    assert page.errors == []


def ask(page, question: str) -> None:
    page.fill("#question", question)
    page.click("#send")


def expect(page, selector: str, pattern: str) -> None:
    """Waits for a text that begins so."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(re.compile(f"^{pattern}"))


def test_an_answer_streams(page):
    page.fill("#temperature", "0")
    expect(page, "#model", "demo")
    ask(page, "introduce yourself")
    expect(page, "#figures", r"\d+ tokens, \d+\.\d tokens/s, first after \d+ ms; prompt \d+ tokens, \d+ cached")
    assert page.text_content("main p.user") == "introduce yourself"
    assert page.text_content("main p.assistant").startswith("I am the demo model of nano-vllm")
    page.wait_for_selector("#send:enabled")


def test_parameters_reach_the_server(page):
    page.click("#reset")
    page.fill("#max_tokens", "3")
    ask(page, "introduce yourself")
    expect(page, "#figures", "3 tokens,")
    page.wait_for_selector("#send:enabled")
    page.fill("#max_tokens", "100000")
    page.fill("#temperature", "-1")
    ask(page, "introduce yourself")
    assert "temperature" in page.wait_for_selector("main p.error").text_content()


def test_stop_ends_the_answer(page):
    page.click("#reset")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "")
    ask(page, "list all prime numbers within 100")
    page.wait_for_selector("main p.assistant")
    page.click("#stop")
    page.wait_for_selector("#send:enabled")
