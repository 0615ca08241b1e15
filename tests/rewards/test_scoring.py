"""Rewards beside the rollout: at the same time, in order, bounded, and with a clear end where one fails.

Nothing here looks at the clock: what must happen at the same time is made to wait for each other.
"""

import importlib.util
import threading

import numpy as np
import pytest
import torch

from crd_fast.errors import UserError
from crd_fast.rewards import scoring
from crd_fast.rewards.registry import default_device
from crd_fast.rewards.scoring import MAX_WAITING, PromptScoring, Reward, Scoring
from tests.training.conftest import NO_MEMORY

PATIENCE = 60  # seconds until a test that hangs fails


def image(value, count=1):
    return np.full((count, 2, 2, 3), value, dtype=np.uint8)


def first_pixel(images, prompts, metadata):
    return [float(pixels[0, 0, 0]) for pixels in images]


def entries(prompt, count=1):
    return [{"prompt": prompt}] * count


def test_scores_while_the_next_are_generated():
    generated, scored = threading.Event(), threading.Event()

    def reward(images, prompts, metadata):
        assert generated.wait(PATIENCE)  # only comes if `put` did not wait for the score
        scored.set()
        return first_pixel(images, prompts, metadata)

    with Scoring([Reward("slow", reward)]) as working:
        working.put(image(1), entries("a"))
        generated.set()
        assert scored.wait(PATIENCE)  # nobody has asked for results yet
        working.put(image(2), entries("b"))
        assert working.results()["slow"].tolist() == [1.0, 2.0]


def test_different_rewards_work_at_the_same_time():
    both = threading.Barrier(2)

    def reward(images, prompts, metadata):
        both.wait(PATIENCE)
        return first_pixel(images, prompts, metadata)

    with Scoring([Reward("one", reward), Reward("two", reward)]) as working:
        working.put(image(7), entries("a"))
        assert {name: values.tolist() for name, values in working.results().items()} == {
            "one": [7],
            "two": [7],
        }


def test_results_come_in_the_order_of_put_and_a_reward_never_overlaps_itself():
    running = threading.Lock()

    def reward(images, prompts, metadata):
        assert running.acquire(blocking=False)
        try:
            assert [entry["prompt"] for entry in metadata] == prompts
            return first_pixel(images, prompts, metadata)
        finally:
            running.release()

    with Scoring(
        [Reward("one", reward), Reward("two", lambda i, p, m: [-x for x in first_pixel(i, p, m)])]
    ) as working:
        for value in range(3 * MAX_WAITING):
            working.put(image(value, 2), entries(str(value), 2))
        results = working.results()
    expected = np.repeat(np.arange(3.0 * MAX_WAITING), 2)
    assert results["one"].tolist() == expected.tolist() and results["two"].tolist() == (-expected).tolist()


def test_the_rollout_waits_for_a_reward_that_is_too_far_behind():
    release = threading.Event()

    def reward(images, prompts, metadata):
        assert release.wait(PATIENCE)
        return first_pixel(images, prompts, metadata)

    with Scoring([Reward("slow", reward)]) as working:
        for value in range(MAX_WAITING):
            working.put(image(value), entries("a"))
        one_too_many = threading.Thread(target=working.put, args=(image(99), entries("a")))
        one_too_many.start()
        one_too_many.join(0.3)
        assert one_too_many.is_alive()
        release.set()
        one_too_many.join(PATIENCE)
        assert len(working.results()["slow"]) == MAX_WAITING + 1


def test_a_reward_that_takes_too_long_ends_the_scoring():
    forever = threading.Event()

    def reward(images, prompts, metadata):
        forever.wait(PATIENCE)

    with Scoring([Reward("hangs", reward, timeout=0.05)]) as working:
        working.put(image(1), entries("a"))
        with pytest.raises(UserError, match=r"^reward hangs: expected values within 0.05 s, got none$"):
            working.results()
    forever.set()


def failing(error, times):
    """A reward that raises `error` so many times before it answers, and how often it was called."""
    calls = []

    def reward(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) <= times:
            raise error
        return first_pixel(images, prompts, metadata)

    return reward, calls


def of(library, *names):
    """Errors of a library's, where it is, which are none of Python's ConnectionError or TimeoutError."""
    if importlib.util.find_spec(library) is None:
        return []
    return [getattr(importlib.import_module(library), name)("no one there") for name in names]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError("no one there"),
        TimeoutError("too slow"),
        *of("requests", "ConnectionError", "ReadTimeout"),
        *of("httpx2", "ConnectError", "ReadTimeout"),
    ],
)
def test_what_is_remote_is_tried_again(monkeypatch, error):
    monkeypatch.setattr(scoring, "FIRST_PAUSE", 0.001)
    reward, calls = failing(error, times=2)
    with Scoring([Reward("remote", reward, retries=2)]) as working:
        working.put(image(5), entries("a"))
        assert working.results()["remote"].tolist() == [5.0] and len(calls) == 3

    reward, calls = failing(error, times=9)
    with Scoring([Reward("remote", reward, retries=2)]) as working:
        working.put(image(5), entries("a"))
        with pytest.raises(UserError, match=rf"reward remote: {type(error).__name__}: {error}, 2 retries"):
            working.results()
    assert len(calls) == 3


@pytest.mark.parametrize("none", NO_MEMORY, ids=str)
def test_a_reward_without_memory_waits_for_what_is_generated(monkeypatch, caplog, none):
    """However often it finds none meanwhile; not for ever where nothing is generated."""
    monkeypatch.setattr(scoring, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(scoring, "LONGEST_PAUSE", 0.001)
    tries, often = [], threading.Event()

    def reward(images, prompts, metadata):
        tries.append(working._lanes[0]._waited_for.is_set())
        if len(tries) == 3 * scoring.WITHOUT_MEMORY:
            often.set()
        if not tries[-1]:
            raise none
        return first_pixel(images, prompts, metadata)

    working = Scoring([Reward("large", reward)])
    with working:
        working.put(image(5), entries("a"))
        assert often.wait(PATIENCE)  # as long as this thread does something else
        assert working.results()["large"].tolist() == [5.0]
    assert tries.count(True) == 1
    assert caplog.messages == ["warning: reward large: out of memory, it is asked again"]

    reward, calls = failing(none, times=99)
    with Scoring([Reward("large", reward)]) as working:
        working.put(image(5), entries("a"))
        words = r"(CUDA (.*memory|.*_ALLOC_)|\[enforce fail .* DefaultCPUAllocator: can't allocate memory)"
        with pytest.raises(UserError, match=f"^reward large: OutOfMemoryError: {words}"):
            working.results()
    assert len(calls) >= scoring.WITHOUT_MEMORY


def test_a_mistake_in_a_reward_is_not_tried_again_and_says_where_it_is():
    reward, calls = failing(ZeroDivisionError("division by zero"), times=9)
    with Scoring([Reward("mine", reward)]) as working:
        working.put(image(5), entries("a"))
        with pytest.raises(
            UserError, match=r"reward mine: ZeroDivisionError: division by zero \(.*test_scoring.py line"
        ):
            working.results()
    assert len(calls) == 1


def test_a_failure_ends_the_rollout_at_the_next_put():
    failed = threading.Event()

    def reward(images, prompts, metadata):
        failed.set()
        raise KeyError("x")

    with Scoring([Reward("mine", reward)]) as working:
        working.put(image(5), entries("a"))
        assert failed.wait(PATIENCE)
        with pytest.raises(UserError, match="reward mine: KeyError"):
            for _ in range(MAX_WAITING + 1):  # at the latest when no more may wait
                working.put(image(5), entries("a"))


@pytest.mark.parametrize(
    "values, words",
    [
        ([1.0], "expected 2 values, got 1"),
        ([1.0, float("nan")], "expected finite numbers, got nan for image 1"),
        (["good", 1.0], "expected finite numbers, got 'good' for image 0"),
        (None, "expected 2 values, got NoneType"),
        ({0: 0.5, 1: 1.0}, "expected 2 values in a row, got dict"),
        ({0.5, 1.0}, "expected 2 values in a row, got set"),
        (
            np.ma.masked_array([1.0, 2.0], mask=[False, True]),
            "expected finite numbers, got masked for image 1",
        ),
    ],
)
def test_values_that_are_none(values, words):
    with Scoring([Reward("mine", lambda *_: values)]) as working:
        working.put(image(1, 2), entries("a", 2))
        with pytest.raises(UserError, match=f"reward mine: {words}"):
            working.results()


def test_a_generator_is_a_reward_s_own_code():
    """What it raises is not taken for values that are none; torch keeps nothing of what it computes."""

    def wrong(images, prompts, metadata):
        for prompt in prompts:
            yield 1.0 + prompt

    def records(images, prompts, metadata):
        yield from [torch.is_grad_enabled()] * len(images)

    with Scoring([Reward("mine", wrong)]) as working:
        working.put(image(1, 2), entries("a", 2))
        with pytest.raises(UserError, match=r"^reward mine: TypeError: .*test_scoring.py line"):
            working.results()
    with Scoring([Reward("mine", records)]) as working:
        working.put(image(1, 2), entries("a", 2))
        assert working.results()["mine"].tolist() == [0.0, 0.0]


def test_pauses_do_not_grow_for_ever():
    pauses = []
    call, _ = failing(ConnectionError("no one there"), times=9)
    assert scoring.repeated(lambda: call(image(5), ["a"], [{}]), 9, pauses.append) == [5.0]
    assert pauses == [0.5, 1, 2, 4, 8, 8, 8, 8, 8]


def test_values_of_any_numeric_type():
    for values in (
        np.array([1, 2]),
        torch.tensor([1.0, 2.0]),
        [np.float32(1), True + 1],
        (x for x in (1, 2)),
    ):
        with Scoring([Reward("mine", lambda *_, values=values: values)]) as working:
            working.put(image(1, 2), entries("a", 2))
            assert working.results()["mine"].tolist() == [1.0, 2.0]


def test_a_reward_that_changes_its_images_changes_no_other_s():
    """By torch, which takes no notice that an array is read-only."""

    def blacken(images, prompts, metadata):
        torch.from_numpy(images).zero_()
        return first_pixel(images, prompts, metadata)

    kept = image(9)
    for first, second in (("blackens", "reads"), ("reads", "blackens")):
        functions = {"blackens": blacken, "reads": first_pixel}
        with Scoring([Reward(name, functions[name]) for name in (first, second)]) as working:
            working.put(kept, entries("a"))
            values = working.results()
        assert values["reads"].tolist() == [9.0] and values["blackens"].tolist() == [0.0]
    assert (kept == 9).all()


def test_a_reward_that_writes_to_its_images_is_named():
    def marks(images, prompts, metadata):
        images[:] = 255
        return first_pixel(images, prompts, metadata)

    with Scoring([Reward("marks", marks)]) as working:
        working.put(image(9), entries("a"))
        with pytest.raises(
            UserError,
            match=r"^reward marks: writes to its images, which are read-only; .*test_scoring.py line",
        ):
            working.results()


def test_a_reward_that_edits_its_metadata_edits_its_own():
    """Not the prompts that are trained on, not another reward's, not that of the prompt's other samples."""
    seen = []

    def edits(images, prompts, metadata):
        for entry in metadata:
            entry["prompt"] = entry["prompt"].upper()
            entry["include"].append("x")
        seen.append([len(entry["include"]) for entry in metadata])
        prompts.clear()
        return [0.0] * len(images)

    metadata = [{"prompt": "a", "include": []}] * 2
    for _ in range(2):
        with Scoring(
            [Reward("edits", edits), Reward("reads", lambda i, p, m: [len(p[0])] * len(m))]
        ) as working:
            working.put(image(1, 2), metadata)
            assert working.results()["reads"].tolist() == [1.0, 1.0]
    assert seen == [[1, 1]] * 2 and metadata == [{"prompt": "a", "include": []}] * 2


def test_the_threads_end_with_the_scoring():
    def reward_threads():
        return [thread for thread in threading.enumerate() if thread.name == "reward tidy"]

    with Scoring([Reward("tidy", first_pixel)]) as working:
        working.put(image(1), entries("a"))
        working.results()
        threads = reward_threads()
        assert len(threads) == 1
    threads[0].join(PATIENCE)
    assert not reward_threads()


@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 5, 2), (4, 4, 4)])
def test_calls_are_whole_prompts_whatever_the_micro_batch(sizes):
    """Three prompts of four samples; latents arrive in micro-batches of `sizes`."""
    calls = []

    def reward(images, prompts, metadata):
        calls.append((prompts, images[:, 0, 0, 0].tolist()))
        return first_pixel(images, prompts, metadata)

    latents = torch.arange(12)
    metadata = [{"prompt": name} for name in "abc"]
    with Scoring([Reward("mine", reward)]) as working:
        put = PromptScoring(
            working,
            lambda x: x.numpy().astype(np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8),
            metadata,
            4,
        )
        for end in np.cumsum(sizes):
            put(latents[:end])
        assert working.results()["mine"].tolist() == list(range(12))
    assert calls == [(["a"] * 4, [0, 1, 2, 3]), (["b"] * 4, [4, 5, 6, 7]), (["c"] * 4, [8, 9, 10, 11])]


def test_threads_work_on_the_process_own_gpu(monkeypatch):
    """torch starts every thread on the first GPU, whichever the process was given."""
    chosen, done = [], threading.Event()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda gpu: chosen.append((threading.current_thread().name, gpu))
    )

    def reward(images, prompts, metadata):
        done.set()
        return first_pixel(images, prompts, metadata)

    assert default_device() == "cuda:3"
    with Scoring([Reward("network", reward)]) as working:
        working.put(image(1), entries("a"))
        working.results()
    assert done.is_set() and chosen == [("reward network", 3)]
