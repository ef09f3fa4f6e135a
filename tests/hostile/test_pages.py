"""Hostile documents in a real browser: what the service answers and the page it writes load nothing and run nothing."""

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from app import report
from app.evaluation import Judged, Passage
from app.judgements import Question
from app.report import Evaluation, Results
from tests.hostile.test_framing import TEXTS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]


@pytest.fixture
def bait():
    """A server that notes what is asked of it: its address and the paths."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    # A thread for each connection: Chromium opens some ahead and asks nothing over them.
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def hostile(bait):
    several = "\n".join(TEXTS.values()).replace("http://127.0.0.1:9", bait)
    return (
        f"<img src={bait}/image><script>fetch('{bait}/script')</script><iframe src={bait}/frame></iframe>"
        f"<svg onload=\"fetch('{bait}/svg')\"></svg></script></style>{several}"
    )


def visit(address, folder):
    """What Chromium makes of it, after scripts and what they load had three seconds."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--virtual-time-budget=3000"]
    done = subprocess.run(
        [str(CHROMIUM), *options, "--dump-dom", address], capture_output=True, timeout=100, check=True, text=True
    )
    return done.stdout


def test_a_page_that_does_load_is_noticed(bait, tmp_path):
    (tmp_path / "page.html").write_text("<p>" + hostile(bait[0]).replace("alert(1)", ""))
    visit(f"file://{tmp_path}/page.html", tmp_path / "profile")
    assert {"/image", "/script", "/frame"} <= set(bait[1])


def test_answers_opened_in_a_browser_are_text(served, bait, tmp_path):
    body = {
        "tenant_id": "acme",
        "content": hostile(bait[0]),
        "title": "<script>fetch('" + bait[0] + "/title')</script>",
    }
    httpx.put(f"{served.address}/documents/page.html", json=body, timeout=60).raise_for_status()
    for path in ("documents/page.html", "documents", "documents/<img src=x>", "status"):
        shown = visit(
            f"{served.address}/{path}?tenant_id=acme&x={hostile(bait[0])[:200]}"[:2_000], tmp_path / "profile"
        )
        visit(f"{served.address}/{path}?tenant_id=acme", tmp_path / "profile")
        assert "<iframe" not in shown
    assert bait[1] == []


def test_the_page_of_an_evaluation_shows_hostile_texts_as_text(bait, tmp_path):
    text = hostile(bait[0])
    one = Judged(Question("q1", text, "t", {text: 1}, "f:1"), {text: 0.9}, 5.0)
    results = {text: Results([one, one], [], {"q1": {text: Passage(text, 0.9)}})}
    (tmp_path / "report.html").write_text(report.page(Evaluation(name=text, k=10, facts={text: text}, modes=results)))
    shown = visit(f"file://{tmp_path}/report.html", tmp_path / "profile")
    assert bait[1] == []
    assert "&lt;iframe" in shown
