"""The report in a headless Chromium, on a laptop and on a phone: fast, silent, inert; its transcripts can be used."""

import asyncio
from pathlib import Path

import chromium
import pytest
from report_results import full_results, poisoned, realistic, transcript

from agentark_jax.report.page import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.BINARY is None, reason="there is no Chromium on this machine"),
]
WIDTHS = (390, 1440)
CARDS = "[...document.querySelectorAll('.card')]"
OPEN = f"{CARDS}.filter((card) => card.open)"
STATUS = "document.getElementById('transcript-status').textContent"


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A report of 10,000 answers of 150 tokens and more."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, full_results(), [realistic(index) for index in range(1667)])
    return path


@pytest.mark.parametrize("width", WIDTHS)
def test_ten_thousand_turns_open_in_silence(large, tmp_path, width, record_property):
    """How long it takes is told, and no test: that is the machine's affair."""

    async def look():
        async with chromium.tab(tmp_path, width) as tab:
            seconds = min([await tab.open(large) for _ in range(3)])
            assert "of 1,667 questions" in await tab.run(STATUS)
            across = await tab.run("document.documentElement.scrollWidth")
            loud = tab.told("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
            asked = {each["request"]["url"].split(",")[0] for each in tab.told("Network.requestWillBeSent")}
            return seconds, across, loud, asked

    seconds, across, loud, asked = asyncio.run(look())
    record_property("seconds", seconds)
    print(f"{width} px: {seconds:.2f} s")  # pytest -s shows it
    assert across <= width
    assert loud == []
    assert asked <= {large.as_uri(), "data:"}


@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_text_does_nothing_and_its_question_has_an_address(tmp_path, width):
    results = poisoned(full_results())
    results["schema"] = 1
    item = poisoned(transcript(0))
    item["answers"]["__proto__"] = item["answers"].pop(next(iter(item["answers"])))
    write_report(tmp_path / "report.html", results, [item])

    async def look():
        async with chromium.tab(tmp_path / "profile", width) as tab:
            await tab.open(tmp_path / "report.html")
            address = await tab.run(f"{CARDS}[0].querySelector('a[href^=\"#q=\"]').getAttribute('href')")
            await tab.open(tmp_path / "report.html", address)
            await tab.wait(f"{OPEN}.length === 1")
            assert await tab.run(f"{CARDS}[0].querySelectorAll('img, script, iframe').length") == 0
            assert "alert(1)" in await tab.run(f"{CARDS}[0].textContent")
            assert "no question" not in await tab.run(STATUS)
            assert await tab.run("document.documentElement.scrollWidth") <= width
            return tab.told("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")

    assert asyncio.run(look()) == []


def test_transcripts_are_found_filtered_and_linked(tmp_path):
    """Of five questions each filter finds the one it should; addresses, search and the next question work."""
    items = [transcript(index) for index in range(5)]
    for item, kind, debate, student in zip(
        items,
        (None, "wrong→right", "right→wrong", None, None),
        ("right", "right", "wrong", "right", "wrong"),
        ("right", "right", "wrong", "wrong", "right"),
        strict=True,
    ):
        for turn in item["rounds"][1]:
            turn["flip"] = kind
        item |= {"final_verdict": debate, "split": "debate" if item is items[0] else "held_out"}
        item["answers"]["student"] = {"text": "mine", "answer": "7", "verdict": student}
    items[3]["answers"]["base"]["text"] = "A needle."
    write_report(tmp_path / "report.html", full_results(), items)

    async def look():
        async with chromium.tab(tmp_path / "profile", 1440) as tab:
            await tab.open(tmp_path / "report.html")

            async def listed(action: str) -> list[str]:
                await tab.run(action)
                await asyncio.sleep(0.3)  # typing is waited for
                return await tab.run(f"{CARDS}.map((card) => card.querySelector('.question').textContent[9])")

            def change(name: str, value: str) -> str:
                event = "input" if name == "search" else "change"
                field = f"document.getElementById('transcript-{name}')"
                return f"{field}.value = '{value}'; {field}.dispatchEvent(new Event('{event}'))"

            press = "document.querySelector('[data-filter={}]').click()".format
            assert await listed(press("gained")) == ["1"]
            assert await listed(press("lost")) == ["2"]
            assert await listed(press("wrong")) == ["2", "4"]
            assert await listed(press("debate")) == ["3"]
            assert await listed(press("arm")) == ["4"]
            assert await listed(change("arm", "base")) == ["2", "4"]
            assert await listed(press("all")) == ["0", "1", "2", "3", "4"]
            assert await listed(change("split", "debate")) == ["0"]
            assert await listed(change("split", "held_out")) == ["1", "2", "3", "4"]
            assert await listed(change("search", "NEEDLE")) == ["3"]
            assert await listed(change("search", "nothing like it")) == []
            # An address takes away the filters that hide its question.
            assert await listed(f"location.hash = '#q={items[1]['id']}'") == ["0", "1", "2", "3", "4"]
            inside = await tab.run(f"{OPEN}.map((card) => card.textContent).join()")
            assert "Question 1?" in inside
            assert "↻ wrong → right, was 7" in inside
            assert "Debate student✓ 7mine" in inside
            await tab.run(
                f"[...{OPEN}[0].querySelectorAll('a')].find((a) => a.textContent === 'Next question →').click()"
            )
            await tab.wait(f"{OPEN}.length === 1 && {OPEN}[0].textContent.includes('Question 2?')")
            assert await tab.run("location.hash") == f"#q={items[2]['id']}"
            await tab.run("location.hash = '#q=%'")
            await tab.wait(f"{STATUS}.includes('no question of the address')")
            return tab.told("Runtime.exceptionThrown", "Log.entryAdded")

    assert asyncio.run(look()) == []
