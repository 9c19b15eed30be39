"""The report of runs that go on, on this machine's loopback address: `python -m recipes.report RUN --serve`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from recipes.reporting import charts
from recipes.reporting.page import numbers, render
from recipes.reporting.runs import load_run

HOST = "127.0.0.1"  # never another: nobody is asked for a password here


def make_server(run_dirs: Sequence[Path], port: int = 0) -> ThreadingHTTPServer:
    """A server of ``/`` (the page) and ``/data.json`` (its numbers), both read anew at every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site may make the browser ask here; it cannot choose the name that the browser asks for.
            if self.headers.get("Host") not in {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}:  # type: ignore[attr-defined]
                return self._answer(403, "text/plain", lambda: "ask for 127.0.0.1")
            if self.path == "/":
                return self._answer(200, "text/html", lambda: render([load_run(path) for path in run_dirs], live=True))
            if self.path == "/data.json":
                return self._answer(200, "application/json", lambda: data(run_dirs))
            return self._answer(404, "text/plain", lambda: "not here")

        def _answer(self, status: int, kind: str, make: Callable[[], str]) -> None:
            try:
                body = make()
            except (ValueError, OSError) as error:  # no step yet, or a file that is just being written
                status, kind, body = 503, "text/plain", f"{error}"
            content = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer((HOST, port), Handler)


def data(run_dirs: Sequence[Path]) -> str:
    """What the page's script draws, as JSON."""
    runs = [load_run(path) for path in run_dirs]
    overlay = {run.name: run.series for run in runs}
    main, used = charts.main_charts(overlay)
    return json.dumps(numbers(runs, [*main, *charts.other_charts(overlay, used)]))


def serve(run_dirs: Sequence[Path], port: int) -> None:
    """Serve until Ctrl-C. Raises ValueError when a directory is not a run's."""
    for path in run_dirs:
        load_run(path)
    with make_server(run_dirs, port) as server:
        print(f"http://{HOST}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # this is how it ends
            server.serve_forever()
