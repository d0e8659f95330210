"""The order in which prompts are read, in a simulated queue, and turns of threads."""

import threading

import pytest

from pop_local.engine.prefill_scheduler import (
    AGE_CHUNKS,
    MIN_SHARED,
    PrefillScheduler,
    PrefillTurns,
    QueuedPrompt,
)
from pop_local.engine.prompt.prompt import Prompt

CHUNK = 256


def queued(n_rows: int, first: int = 0, scope: str = "") -> QueuedPrompt:
    """Return a prompt whose tokens start at `first`, so that prompts of one `first` share a prefix.

    Other prompts differ in every token.
    """
    return QueuedPrompt(Prompt(range(first, first + n_rows)), scope, n_rows)


def simulated(arrivals: dict[int, QueuedPrompt], until: int = 10**6) -> dict[QueuedPrompt, int]:
    """Read prompts that arrive after a number of rows. Return when each one was read, in rows."""
    scheduler, waiting = PrefillScheduler(), dict(arrivals)
    now, ends = 0, {}
    while now < until:
        for at in [at for at in waiting if at <= now]:
            scheduler.add(waiting.pop(at))
        prompt = scheduler.next()
        if prompt is None:
            if not waiting:
                break
            now = min(waiting)
            continue
        if not prompt.has_started:
            scheduler.record(prompt, prompt.n_left)
        n = min(CHUNK, prompt.n_left)
        now += n
        scheduler.record(prompt, prompt.n_left - n)
        if not prompt.n_left:
            scheduler.remove(prompt)
            ends[prompt] = now
    return ends


@pytest.mark.parametrize(
    ("arrivals", "order"),
    [
        ({0: 7000, 300: 10}, [(300, 2 * CHUNK + 10), (0, 7010)]),
        # The first prompt has only 600 rows left when the second one with 700 rows arrives.
        ({0: 1368, 768: 700, 769: 100}, [(769, 1124), (0, 1468), (768, 2168)]),
        (dict.fromkeys(range(4), 3000), [(n, 3000 * (n + 1)) for n in range(4)]),
    ],
    ids=["short", "fewest rows left", "equal"],
)
def test_reads_prompt_with_fewest_rows_left(arrivals, order):
    prompts = {at: queued(n_rows, 10_000 * at) for at, n_rows in arrivals.items()}
    ends = simulated(prompts)
    arrival = {prompt: at for at, prompt in prompts.items()}
    assert [(arrival[prompt], end) for prompt, end in ends.items()] == order


def test_questions_are_not_overtaken_by_shorter_questions():
    """Shorter questions arrive as fast as they are read."""
    long, question = queued(4000), queued(49, 10_000)
    arrivals = {0: long, 300: question}
    arrivals |= {301 + 10 * n: queued(10, 20_000 + 100 * n) for n in range(400)}
    assert simulated(arrivals)[question] == 2 * CHUNK + 49


def test_long_prompt_is_never_starved():
    """Short prompts arrive as fast as they are read."""
    long = queued(4000)
    arrivals = {0: long} | {100 * n + 1: queued(100, 10_000 * n) for n in range(1, 600)}
    end = simulated(arrivals)[long]
    n_chunks = 4000 / CHUNK
    assert 4000 < end <= (n_chunks + 1) * (100 * (AGE_CHUNKS + 1) + CHUNK)


def test_ageing_delays_short_prompts_by_one_chunk_only():
    long = queued(4000)
    shorts = {300 * n + 1: queued(100, 10_000 * n) for n in range(1, 60)}
    ends = simulated({0: long} | shorts)
    waits = [ends[short] - at for at, short in shorts.items()]
    assert max(waits) <= 2 * CHUNK + AGE_CHUNKS * 100


def test_ageing_restarts_with_next_oldest_prompt():
    scheduler = PrefillScheduler()
    first, second, third = queued(2000), queued(2000, 10_000), queued(2000, 20_000)
    for prompt in (first, second, third):
        scheduler.add(prompt)
        scheduler.record(prompt, 2000)
    for n_left in range(1900, 1900 - 100 * AGE_CHUNKS, -100):
        scheduler.record(second if n_left % 200 else third, n_left)
    assert scheduler.next() is first
    scheduler.remove(first)
    assert scheduler.next() is third


def test_estimate_of_cached_rows_does_not_count_as_reading():
    scheduler = PrefillScheduler()
    long, cached = queued(7000), queued(6900, 10_000)
    scheduler.add(long)
    scheduler.record(long, 7000)
    for prompt in [cached, *(queued(6900, 20_000 * n) for n in range(1, AGE_CHUNKS))]:
        scheduler.add(prompt)
        scheduler.record(prompt, 50)
    assert scheduler.next() is cached


@pytest.mark.parametrize("scope", ["", "another client"])
def test_prompt_waits_for_a_prefix_that_is_being_read(scope):
    """The second prompt has fewer rows, and can share 3,000 of them only with its own client's."""
    n = 3000
    first = queued(n + 600)
    second = QueuedPrompt(Prompt([*range(n), *range(9000, 9500)]), scope, n + 500)
    scheduler = PrefillScheduler()
    scheduler.add(first)
    scheduler.record(first, n + 600)
    scheduler.add(second)
    assert scheduler.next() is (second if scope else first)
    scheduler.record(first, 600 + MIN_SHARED - 1)
    second.n_left = 500  # so that only the common prefix matters
    assert scheduler.next() is second
    second.n_left = n + 500
    scheduler.record(first, 600)
    assert scheduler.next() is first


def test_threads_take_turns():
    """A thread that loses its turn waits until the other prompt has been read."""
    turns, events = PrefillTurns(), []
    long, short = queued(3 * CHUNK), queued(10, 10_000)
    arrived = threading.Event()

    def read_short() -> None:
        arrived.set()
        turns.begin(short, lambda: False)
        turns.record(short, 10)
        events.append("short")
        turns.end(short)

    turns.begin(long, lambda: False)
    assert turns.record(long, 3 * CHUNK)
    thread = threading.Thread(target=read_short)
    thread.start()
    arrived.wait(10)
    while turns.record(long, 2 * CHUNK):
        pass  # until the other thread has queued its prompt
    turns.wait(long, lambda: False)
    events.append("long")
    turns.end(long)
    thread.join(10)
    assert events == ["short", "long"]


def test_stopped_prompt_stops_waiting():
    turns = PrefillTurns()
    turns.begin(queued(10), lambda: False)
    turns.begin(queued(5, 10_000), lambda: True)
