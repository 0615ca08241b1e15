"""Rewards in processes of their own: the same values in the same order, whatever becomes of a process.

Nothing here looks at the clock: what must happen at the same time is made to wait for each other.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from crd_fast.errors import UserError
from crd_fast.rewards import Rewards, load
from crd_fast.rewards.failures import RewardFailed
from crd_fast.rewards.workers import SHARED, Workers
from tests.cli.conftest import SMALL, metrics
from tests.forked import crd_fast

PATIENCE = 120  # seconds until a test that hangs fails
MINE = Path(__file__).with_name("rewards_in_workers.py").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the user's module of rewards is."""
    (tmp_path / "workers_mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("workers_mine", None)


@pytest.fixture
def rewards(folder):
    """Makes rewards of the user's module, which end with the test."""
    made = []

    def make(name, device="cpu", **settings):
        made.append(Rewards({f"workers_mine:{name}": settings}, device=device))
        return made[-1]

    yield make
    for each in made:
        each.close()


def pictures(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def scored(rewards, images, prompts):
    """The values of a single reward, of a call for each prompt."""
    with rewards.start() as scoring:
        for image, prompt in zip(np.split(images, len(prompts)), prompts):
            scoring.put(image, [{"prompt": prompt}] * len(image))
        (values,) = scoring.results().values()
    return values.tolist()


def wait_until(true):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid):
    """Whether it has ended; a zombie whose parent does not look has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_values_are_those_without_workers_in_order(rewards):
    images, prompts = pictures(120, 16), ["x" * i for i in range(40)]
    expected = scored(rewards("mean", scale=2.0), images, prompts)
    before = images.copy()
    assert scored(rewards("mean", scale=2.0, workers=2), images, prompts) == expected
    processes = scored(rewards("process", workers=2), images, prompts)
    assert len(set(processes)) <= 2 and os.getpid() not in processes
    assert np.array_equal(images, before)


def test_calls_are_at_work_at_the_same_time(rewards):
    assert len(scored(rewards("both", workers=2, timeout=PATIENCE), pictures(2), ["a", "b"])) == 2


def test_larger_and_smaller_pictures_and_none_in_shared_memory(rewards, monkeypatch):
    found, alone = rewards("mean", workers=1), rewards("mean")
    for size in (4, 64, 2, 65):
        images = pictures(3, size)
        assert scored(found, images, ["a"]) == scored(alone, images, ["a"])
    monkeypatch.setattr("crd_fast.rewards.workers._reserve", full)
    images = pictures(3, 128)
    assert scored(found, images, ["a"]) == scored(alone, images, ["a"])


def full(memory):
    memory.close()
    memory.unlink()
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["exits", "killed", "hangs"])
def test_a_worker_that_is_lost_is_replaced_and_its_pictures_scored_again(rewards, how):
    images, prompts = pictures(6), ["first", "once", "last"]
    found = rewards(how, workers=1, timeout=5 if how == "hangs" else PATIENCE)
    assert scored(found, images, prompts) == scored(rewards("mean"), images, prompts)


@pytest.mark.parametrize(
    "how, words",
    [("exits", "its worker ended with exit code 7"), ("hangs", "its worker gave no answer within 5 s")],
)
def test_one_that_is_lost_twice_ends_the_scoring_in_one_line(rewards, how, words):
    found = rewards(how, workers=2, timeout=5 if how == "hangs" else PATIENCE)
    with pytest.raises(RewardFailed) as error:
        scored(found, pictures(3), ["fine", "always", "fine"])
    assert str(error.value) == f"reward workers_mine:{how}: expected values, but {words}, twice"
    assert scored(found, pictures(1), ["fine"])  # there are new ones


@pytest.mark.parametrize("method", ["check", "report"])
def test_one_that_hangs_while_it_checks_or_reports_is_lost_as_well(rewards, monkeypatch, method):
    found, metadata = rewards("HangsIn", workers=1, method=method, timeout=1), [{"prompt": "a"}]
    monkeypatch.setattr("crd_fast.rewards.workers.LOADING", 1.0)
    with pytest.raises(RewardFailed, match="its worker gave no answer within 1 s, twice"):
        if method == "check":
            found.check(metadata)
        found.report(pictures(1), metadata, {"workers_mine:HangsIn": np.zeros(1)})


@pytest.mark.parametrize("how", ["alone", "forked", "answering"])
def test_a_worker_that_ends_by_itself_leaves_nothing_behind(rewards, folder, how):
    """And is known to have ended, though a process that it has forked holds its pipes."""
    found = rewards("leaves", workers=1, timeout=PATIENCE)
    with pytest.raises(RewardFailed, match="its worker ended with exit code 7, twice"):
        scored(found, pictures(1), [how])
    children = [int(file.name[4:]) for file in folder.glob("pid-*")]
    assert len(children) == 2
    wait_until(lambda: all(map(gone, children)))


def test_nor_does_one_that_ends_while_nobody_waits_for_it(rewards, folder):
    found = rewards("leaves", workers=1)
    (worker,) = scored(found, pictures(1), ["idle"])
    (folder / "answered").touch()
    wait_until(lambda: gone(int(worker)))
    found.close()
    (child,) = [int(file.name[4:]) for file in folder.glob("pid-*")]
    wait_until(lambda: gone(child))


@pytest.mark.parametrize(
    "name, prompt, words",
    [
        ("fails", "key", r"reward workers_mine:fails: KeyError: 'x' \(.*workers_mine.py line \d+\)$"),
        ("fails", "user", "^reward mine: no$"),
        ("fails", "exit", r"reward workers_mine:fails: wanted to end the process \(SystemExit: 3\)"),
        ("nothing", "a", "reward workers_mine:nothing: expected finite numbers, got nan for image 0"),
    ],
)
def test_what_a_reward_raises_is_raised_here_as_without_workers(rewards, name, prompt, words):
    with pytest.raises(UserError, match=words):
        scored(rewards(name, workers=1), pictures(1), [prompt])


def test_what_is_remote_is_tried_again(rewards, monkeypatch, folder):
    monkeypatch.setattr("crd_fast.rewards.scoring.FIRST_PAUSE", 0.001)
    assert scored(rewards("remote", workers=1), pictures(1), ["a"])
    for file in folder.glob("remote-*"):
        file.unlink()
    with pytest.raises(UserError, match="ConnectionRefusedError: no one there, 1 retries"):
        scored(rewards("remote", workers=1, retries=1), pictures(1), ["a"])


def test_a_worker_without_memory_is_asked_again(rewards, monkeypatch, folder):
    monkeypatch.setattr("crd_fast.rewards.scoring.FIRST_PAUSE", 0.001)
    assert scored(rewards("large", workers=1), pictures(1), ["a"])
    assert (folder / "large").exists()
    assert scored(rewards("LargeAgain", workers=1), pictures(1), ["a"])
    assert (folder / "loaded-again").exists()


@pytest.mark.parametrize("workers", [{}, {"workers": 1}])
def test_a_worker_s_pictures_are_read_only_as_well(rewards, workers):
    with pytest.raises(UserError, match="workers_mine:paints: writes to its images, which are read-only"):
        scored(rewards("paints", **workers), pictures(1), ["a"])


def test_check_and_report_are_the_workers(rewards, folder):
    found = rewards("Judge", device="meta", workers=2, limit=200)
    assert len(list(folder.glob("loaded-*"))) == 1  # the second when it is needed
    metadata = [{"prompt": "a"}] * 4
    found.check(metadata)
    with pytest.raises(UserError, match="refused 'refuse this'"):
        found.check([*metadata, {"prompt": "refuse this"}])
    values = found.score(pictures(4), metadata)
    report, _ = found.report(pictures(4), metadata, values)
    assert report["found/meta"] and report["found/images"] == 4
    assert report["found/process"] != os.getpid()
    assert not hasattr(load("workers_mine:mean", {"workers": 1})[0], "check")


def test_what_a_reward_returns_may_be_nothing_that_can_be_sent(rewards):
    found = rewards("Unsendable", workers=1)
    metadata = [{"prompt": "a"}]
    found.check(metadata)
    values = found.score(pictures(1), metadata)
    with pytest.raises(UserError) as error:
        found.report(pictures(1), metadata, values)
    words = "reward workers_mine:Unsendable: workers: expected what can be sent to another process, got "
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_reward_in_a_worker_may_have_processes_of_its_own(rewards):
    assert scored(rewards("pool", workers=1), pictures(2), ["a"]) == [2.0, 2.0]


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("mean", {"workers": 0}, "mean: workers: expected auto or a whole number >= 1, got 0"),
        ("mean", {"workers": "all"}, "workers: expected auto or a whole number >= 1, got 'all'"),
        ("mean", {"workers": 1, "scal": 1}, "unknown setting 'scal', did you mean 'scale'?"),
        ("Judge", {"workers": 1, "limit": 0}, "reward workers_mine:Judge: limit: expected at least 1, got 0"),
        ("Broken", {"workers": 1}, "Broken: expected values, but its worker ended with exit code 9"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_any_work(rewards, name, settings, words):
    with pytest.raises(UserError) as error:
        rewards(name, **settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_another_process_cannot_import_is_refused():
    with pytest.raises(UserError, match="workers: expected a reward that another process can import"):
        Rewards({lambda images, prompts, metadata: [0.0]: {"workers": 1}})


def test_auto_is_the_cores_but_one(folder, monkeypatch):
    usable = len(os.sched_getaffinity(0))
    assert load("workers_mine:mean", {"workers": "auto"})[1] == {"workers": max(1, usable - 1)}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert load("workers_mine:mean", {"workers": "auto"})[1] == {"workers": 15}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert load("workers_mine:mean", {"workers": "auto"})[1] == {"workers": 3}


def test_nothing_is_left_after_the_end(rewards, monkeypatch):
    segments = []

    class Noted(SharedMemory):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            segments.append(SHARED / self.name.lstrip("/"))

    monkeypatch.setattr("crd_fast.rewards.workers.SharedMemory", Noted)
    found = rewards("process", workers=2)
    processes = set(map(int, scored(found, pictures(20), [str(i) for i in range(20)])))
    assert segments and all(segment.exists() for segment in segments)
    found.close()
    assert all(map(gone, processes)) and not any(segment.exists() for segment in segments)
    with pytest.raises(UserError, match="have been ended"):
        scored(found, pictures(1), ["a"])


def test_what_nobody_holds_any_more_ends(folder):
    reward = Workers("mean", "workers_mine:process", {}, 1, 60.0)
    reward.setup("cpu")
    (process,) = reward.score(pictures(1), ["a"], [{"prompt": "a"}])
    del reward
    gc.collect()
    assert gone(int(process))


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
import numpy as np
from crd_fast.rewards import Rewards

if __name__ == "__main__":
    rewards = Rewards({"workers_mine:starts_more": {"workers": 2}}, device="cpu")
    with rewards.start() as scoring:
        for prompt in "ab":
            scoring.put(np.zeros((1, 8, 8, 3), np.uint8), [{"prompt": prompt}])
        print("put", flush=True)
        if sys.argv[1] == "crash":
            raise RuntimeError("crash")
        scoring.results()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, "crash"])
def test_no_process_outlives_this_one(folder, how):
    """Two workers that hang, and what they have started, end with their parent however it ends."""
    (folder / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, "parent.py", str(how)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert parent.stdout.readline() == b"put\n"
    if how == "crash":  # whatever of it was started by then
        parent.wait(PATIENCE)
    else:
        wait_until(lambda: len(list(folder.glob("pid-*"))) == 4)
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) >= 4
        # as a terminal does: to the whole group
        os.killpg(parent.pid, how) if how == signal.SIGINT else os.kill(parent.pid, how)
        parent.wait(PATIENCE)
        wait_until(lambda: all(gone(process.pid) for process in family))
    wait_until(lambda: all(gone(int(file.name[4:])) for file in folder.glob("pid-*")))


@pytest.mark.slow
def test_a_run_and_a_score_are_those_without_workers(rewards, folder):
    values = {}
    for workers in ("", "workers: 2, "):
        recipe = SMALL.replace("evaluate:  {every: 2", "evaluate:  {every: 1")
        name = "with" if workers else "without"
        chosen = f"'workers_mine:mean': {{{workers}scale: 0.5}}, geneval: {{{workers}weight: 1.0}}"
        (folder / f"{name}.yaml").write_text(f"{recipe}rewards: {{{chosen}}}\n")
        done = crd_fast(folder / "said", "train", f"{name}.yaml", "--output", name).wait()
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        values[name] = metrics(folder / name)
    assert values["with"] == values["without"] and values["with"][-1]["eval/overall"] >= 0

    (folder / "pictures").mkdir()
    for i, image in enumerate(pictures(5)):
        Image.fromarray(image).save(folder / "pictures" / f"{i}.png")
    (folder / "prompts.txt").write_text("a\nbb\nbb\nccc\nd\n")
    where = ["--reward", "workers_mine:mean", "--images", "pictures", "--prompts", "prompts.txt"]
    done = crd_fast(folder / "said", "score", *where, "--set", "workers=2", "--json", "out.json").wait()
    assert done.returncode == 0, done.stderr
    prompts = ["a", "bb", "bb", "ccc", "d"]
    direct = rewards("mean").score(pictures(5), [{"prompt": prompt} for prompt in prompts])
    rows = json.loads((folder / "out.json").read_text())["scores"]
    assert [row["score"] for row in rows] == direct["workers_mine:mean"].tolist()
