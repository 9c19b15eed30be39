"""The report in a real headless browser, driven through Chromium's own protocol. Skipped where there is none."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from recipes.reporting.page import write_report

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt install chromium")


class Tab:
    """One page: commands of the DevTools protocol, its console messages and its network requests."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._id = socket, 0
        self.events: list[dict[str, Any]] = []

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        await self._socket.send_json({"id": self._id, "method": method, "params": params})
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), 60)
            if message.get("id") == self._id:
                assert "error" not in message, message
                return dict(message["result"])
            self.events.append(message)

    async def js(self, expression: str) -> Any:
        answer = await self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


@asynccontextmanager
async def open_page(file: Path) -> AsyncIterator[Tab]:
    assert BROWSER is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
        browser = subprocess.Popen(
            [BROWSER, *flags, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = Path(profile) / "DevToolsActivePort"
            for _ in range(600):
                if port.is_file() and port.read_text().count("\n"):
                    break
                await asyncio.sleep(0.1)
            at = f"http://127.0.0.1:{port.read_text().splitlines()[0]}"
            async with aiohttp.ClientSession() as session:
                async with session.get(f"{at}/json/list") as answer:
                    (target,) = [t for t in json.loads(await answer.text()) if t["type"] == "page"]
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = Tab(socket)
                    for domain in ("Page", "Runtime", "Log", "Network"):
                        await tab.command(f"{domain}.enable")
                    await tab.command("Page.navigate", url=file.as_uri())
                    for _ in range(100):
                        if await tab.js("document.readyState === 'complete'"):
                            break
                        await asyncio.sleep(0.1)
                    yield tab
        finally:
            browser.kill()
            browser.wait()


def make_run(path: Path, lr: float) -> Path:
    path.mkdir()
    rows = [
        {
            "step": step,
            "actor/entropy": 1.0 / step + lr,
            "critic/rewards/mean": step / 50,
            "response_length/mean": 10.0,
            "rollout/samples": 4.0,
            "timing_s/step": 36.0,
        }
        for step in range(1, 51)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.yaml").write_text(f"optim: {{lr: {lr}}}\n")
    hostile = "</script><img src=x onerror=document.title='owned'>"
    sample = {"tokens": [hostile, "b"], "entropy": [0.0, 2.0], "logp": [-0.1, -4.0], "response": hostile + "b"}
    sides = {"ratio": [0.5, 1.5], "clip_side": [-1.0, 1.0], "gradient_weight": [0.4, 0.0]}
    samples = [{"step": step, "prompt": f"p{step}", "gold": "7", "reward": 1.0, **sample} for step in (1, 25, 50)]
    samples[1] |= sides
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return path


async def look(file: Path) -> None:
    async with open_page(file) as tab:
        figures = "[...document.querySelectorAll('main > .grid figure')]"
        await tab.js(f"{figures}.forEach(f => f.scrollIntoView()); new Promise(done => setTimeout(done, 500))")
        assert await tab.js(f"{figures}.length") >= 3
        assert await tab.js(f"{figures}.every(f => f.classList.contains('live') && f.querySelector('canvas'))")
        assert await tab.js("getComputedStyle(document.querySelector('figure.live svg')).display") == "none"
        first = "document.querySelector('figure[aria-label^=Entropy]')"
        assert await tab.js(f"{first}.getAttribute('aria-label')") == "Entropy. a: 1.00 to 0.0200; b: 1.50 to 0.520"

        press = f"{first}.focus(); {first}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'KEY'}}))"
        await tab.js(press.replace("KEY", "Home"))
        assert "1.5" in await tab.js(f"{first}.querySelector('.said').textContent"), "values for a screen reader"
        await tab.js("axis.value = 'hours'; axis.dispatchEvent(new Event('change'))")
        assert "hours" in await tab.js(f"{first}.querySelector('.u-legend').innerText")
        await tab.js("smooth.value = 0.9; smooth.dispatchEvent(new Event('input'))")
        assert "a, single" in await tab.js(f"{first}.querySelector('.u-legend').innerText")
        await tab.js("document.querySelector('#log').click()")

        browser = "document.querySelector('.browser')"
        assert await tab.js(f"{browser}.querySelector('.step').value") == "50"
        await tab.js(f"{browser}.querySelector('.before').click()")
        assert "p25" in await tab.js(f"{browser}.querySelector('.cards').innerText")
        await tab.js(f"shade = {browser}.querySelector('.shade'); shade.value = 'entropy'; shade.onchange()")
        tokens = await tab.js(f"[...{browser}.querySelectorAll('pre span')].map(s => [s.textContent, s.title])")
        traced = ", ratio 1.5, above the clip range, gradient weight 0"
        assert tokens[1] == ["b", f"entropy 2 nats, log-probability -4{traced}"]
        assert tokens[0][0].startswith("</script><img")
        await tab.js("shade.value = 'clip'; shade.onchange()")
        colours = await tab.js(f"[...{browser}.querySelectorAll('pre span')].map(s => s.style.background)")
        low, high = ("color-mix(in srgb, var(--s0) 34%", "color-mix(in srgb, var(--s1) 75%")
        assert [colour.startswith(part) for colour, part in zip(colours, (low, high), strict=True)] == [True] * 2, (
            colours
        )
        key = f"{browser}.querySelector('.key').textContent"
        assert (await tab.js(key)).startswith("Blue: ratio below")
        await tab.js(f"{browser}.querySelector('.before').click()")
        assert "no record" in await tab.js(key), "an older step without a trace"
        assert (
            await tab.js("document.querySelectorAll('img').length") == 0 and await tab.js("document.title") == "a · b"
        )

        await tab.command("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        await tab.js("new Promise(done => setTimeout(done, 300))")
        assert await tab.js("document.documentElement.scrollWidth") <= 360, "nothing is wider than a phone"
        light = await tab.js("getComputedStyle(document.body).backgroundColor")
        await tab.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert await tab.js("getComputedStyle(document.body).backgroundColor") != light

        asked = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
        assert [url for url in asked if url != file.as_uri()] == [], "the page asks nothing of anybody"
        said = [e for e in tab.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        assert said == []


def test_the_report_in_a_browser(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "a", 0.0), make_run(tmp_path / "b", 0.5)
    asyncio.run(look(write_report(*runs, out=tmp_path / "both.html")))
