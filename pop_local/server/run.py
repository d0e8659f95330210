"""Runs the application in uvicorn until a signal comes."""

import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from pop_local.server.worker import Worker

_LAST_WORDS_S = 5


class _Server(uvicorn.Server):
    """uvicorn waits for answers to end; here a signal ends them."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._worker.stop()
        super().handle_exit(sig, frame)


def run_app(app: Starlette, listening: socket.socket) -> None:
    """Raises what the signal raises, when nobody uses the model any more."""
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_WORDS_S,
    )
    worker: Worker = app.state.worker
    try:
        _Server(config, worker).run(sockets=[listening])
    finally:
        # After a second signal uvicorn leaves without the end of the lifespan.
        worker.stop()
        worker.join()
