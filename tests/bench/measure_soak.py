"""Run many clients against one server for minutes, and check answers and memory. Not a test.

    python tests/bench/measure_soak.py [MODEL.gguf] [--seconds 1800] [--clients 8] [--parallel 4]
        [--ends 20] [--hostile 1 [--phases 360 120]]
    python tests/bench/measure_soak.py MODEL.gguf --clients 0 --agents 8 --ctx 8192

Each client sends turns of a random kind: whole answers, streams, tools, pictures, other APIs. Some
clients disconnect during an endless answer, some requests are malformed, and some have a grammar
that would take all time or memory. A grammar makes the model repeat a mark, which reveals another
client's answer. Some greedy requests repeat fixed prompts; the program prints how many answers
equal a lone client's. It reads memory, descriptors and /health throughout; memory grows until the
prompt cache is full. With --agents N, N more clients replay the recorded sessions of coding agents
(tests/clients/sessions), which need a model with a chat template. Then --ends servers get a SIGTERM
at a random moment. The default MODEL is a tiny random vision model that catches up between
requests; other models get no pictures. --json prints one JSON object. Exits with 1 if an answer was
lost. Linux only: it reads /proc.

Each client has its own API key. With --hostile N, N more clients send grammar bombs, schemas at the
limit, slow uploads, and streams that they abandon, and the other clients send no bombs. The program
prints the honest clients' times to the first streamed text. With --phases 360 120, the attacks
pause for 120 s before each 360 s of attacks, so that both get the same load from other programs.
"""

import argparse
import json
import random
import signal
import tempfile
import threading
import time
from base64 import b64encode
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import httpx2
import numpy as np
import psutil
from PIL import Image

from shared import Served, make_vision_model, served
from soak_agents import Replayed
from soak_clients import FIXED, Client, Hostile, Inputs, Phases, Tally, greedy, key_of

WATCH_EVERY_S = 5
BLOCK_S = 300  # samples within a block are correlated, so the slope's error comes from the blocks


@dataclass(frozen=True)
class Seen:
    """A snapshot of the server: its memory, its children's memory, its descriptors."""

    after_s: float
    resident_mb: float
    children_mb: float
    n_descriptors: int
    n_children: int


def look(server: Served, began_s: float) -> Seen:
    """Raise /health's error, if it reports one."""
    httpx2.get(f"{server.root}/health", timeout=30).raise_for_status()
    process = psutil.Process(server.process.pid)
    sizes = []
    for child in process.children():
        with suppress(psutil.Error):  # it was one
            sizes.append(child.memory_info().rss / 1e6)
    return Seen(
        after_s=round(time.monotonic() - began_s),
        resident_mb=round(process.memory_info().rss / 1e6, 1),
        children_mb=round(sum(sizes), 1),
        n_descriptors=process.num_fds(),
        n_children=len(sizes),
    )


def url_of(size: int) -> str:
    """Return a picture of noise as a data URL."""
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    encoded = BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG")
    return f"data:image/jpeg;base64,{b64encode(encoded.getvalue()).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--seconds", type=int, default=1800)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--agents", type=int, default=0, help="clients that replay coding agents")
    parser.add_argument("--ctx", type=int, default=2048, help="as of pop-local serve")
    parser.add_argument("--cache-ram", type=int, default=64, help="MiB, as of pop-local serve")
    parser.add_argument("--parallel", type=int, default=4, help="as of pop-local serve")
    parser.add_argument("--ends", type=int, default=20)
    parser.add_argument("--hostile", type=int, help="hostile clients, in addition to --clients")
    parser.add_argument("--phases", type=float, nargs=2, metavar=("HOSTILE_S", "QUIET_S"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_vision_model(Path(folder), "llama")
        pictures = [] if options.model else [url_of(n) for n in (64, 200, 300)]
        soak(model, pictures, options)


def ended(
    model: Path, pictures: list[str], options: argparse.Namespace, rng: random.Random
) -> float:
    """Return the seconds that a busy server takes to shut down, from a random moment on."""
    tally = Tally()
    how = ("--ctx", options.ctx, "--parallel", options.parallel)
    with served(model, *how, *keys(options)) as server:
        end_s = time.monotonic() + 60
        for thread in asking(server, Inputs(pictures), options, end_s, tally):
            thread.daemon = True
            thread.start()
        time.sleep(rng.uniform(0, 8))
        server.process.terminate()
        began_s = time.monotonic()
        server.process.wait(60)
        return time.monotonic() - began_s


def keys(options: argparse.Namespace) -> list[str]:
    n_keys = options.clients + options.agents + (options.hostile or 0)
    return [f"--api-key={key_of(number)}" for number in range(n_keys)]


def phases_of(options: argparse.Namespace, began_s: float) -> Phases:
    hostile_s, quiet_s = options.phases or (float(options.seconds), 0.0)
    return Phases(began_s, hostile_s, quiet_s)


def asking(
    server: Served, inputs: Inputs, options: argparse.Namespace, end_s: float, tally: Tally
) -> list[threading.Thread]:
    has_bombs = options.hostile is None
    phases = phases_of(options, time.monotonic())
    clients: list[Client | Replayed] = [
        Client(server, number, inputs, tally, has_bombs=has_bombs)
        for number in range(options.clients)
    ]
    n_honest = options.clients + options.agents
    for number in range(options.clients, n_honest):
        clients.append(Replayed(server, number, inputs, tally))
    threads = [threading.Thread(target=client.run, args=(end_s,)) for client in clients]
    for number in range(options.hostile or 0):
        threads += Hostile(server, n_honest + number, tally).threads(end_s, phases)
    return threads


def percentiles(tally: Tally, phases: Phases) -> dict[str, dict[str, float]]:
    """Return the TTFTs' number and percentiles in seconds, for each phase."""
    by_phase: dict[str, list[float]] = {}
    for began_s, ttft_s in tally.ttft_s:
        by_phase.setdefault(phases.at(began_s), []).append(ttft_s)
    return {
        phase: {"n": len(times_s)}
        | {f"p{each}": round(float(np.percentile(times_s, each)), 2) for each in (50, 95)}
        for phase, times_s in by_phase.items()
    }


def slope_of(seen: list[Seen]) -> tuple[float, float] | None:
    """Return the resident memory's slope after a third of the time, with its standard error.

    Both are in MB per hour. Without three blocks of samples, return None.
    """
    blocks: dict[int, list[Seen]] = {}
    for one in seen:
        if one.after_s >= seen[-1].after_s / 3:
            blocks.setdefault(int(one.after_s // BLOCK_S), []).append(one)
    if len(blocks) < 3:
        return None
    hours = np.array([np.mean([one.after_s for one in each]) / 3600 for each in blocks.values()])
    sizes = np.array([np.mean([one.resident_mb for one in each]) for each in blocks.values()])
    from_mean = hours - hours.mean()
    slope, mean = np.polyfit(from_mean, sizes, 1)
    residuals = sizes - mean - slope * from_mean
    variance = (residuals**2).sum() / (len(sizes) - 2) / (from_mean**2).sum()
    return round(float(slope), 2), round(float(np.sqrt(variance)), 2)


def soak(model: Path, pictures: list[str], options: argparse.Namespace) -> None:
    tally = Tally()
    seen: list[Seen] = []
    more = ("--cache-ram", options.cache_ram, "--parallel", options.parallel, *keys(options))
    with served(model, "--ctx", options.ctx, *more) as server:
        alone = [greedy(server.root, content, key_of(0)) for content in FIXED]
        began_s = time.monotonic()
        end_s, phases = began_s + options.seconds, phases_of(options, began_s)
        threads = asking(server, Inputs(pictures, alone), options, end_s, tally)
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(WATCH_EVERY_S)
            try:
                seen.append(look(server, began_s))
            except httpx2.HTTPError as error:
                tally.lost.append(f"/health: {error!r}")
        if "Traceback" in server.log:
            tally.lost.append("a traceback in the server's log")
        server.process.terminate()
        began_s = time.monotonic()
        status = server.process.wait(60)
        ended_s = round(time.monotonic() - began_s, 1)
        if status != 128 + signal.SIGTERM:
            tally.lost.append(f"exit status {status}")
        last_words = server.log.splitlines()[-3:]
    rng = random.Random(1)
    ends_s = [ended(model, pictures, options, rng) for _ in range(options.ends)]
    tally.lost += [f"ended only after {seconds:.1f} s" for seconds in ends_s if seconds > 10]
    ttft_s, slope = percentiles(tally, phases), slope_of(seen)
    if options.json:
        figures = {"turns": tally.turns, "lost": tally.lost, "ended_s": ended_s, "log": last_words}
        figures |= {"ttft_s": ttft_s, "hostile": tally.refused, "slope_mb_per_h": slope}
        figures["ends_s"] = [round(seconds, 2) for seconds in ends_s]
        print(json.dumps(figures | {"seen": [asdict(one) for one in seen]}))
    else:
        print(*(f"{n:6} {kind}" for kind, n in tally.turns.items()), sep="\n")
        print(f"{len(tally.lost):6} lost", *tally.lost, f"ended within {ended_s} s", sep="\n")
        print(*(f"TTFT in seconds, {phase}: {each}" for phase, each in ttft_s.items()), sep="\n")
        print(f"hostile requests by status: {dict(tally.refused)}")
        print(f"{len(ends_s)} others ended within {max(ends_s, default=0):.2f} s")
        print(f"memory's slope and its error in MB per hour: {slope}")
        for one in seen[:: max(1, len(seen) // 20)]:
            print(one)
    if tally.lost:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
