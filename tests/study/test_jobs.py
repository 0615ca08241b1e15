"""`crd-fast study --jobs`: runs in processes of their own, stopped and gone on with as one."""

import json
import os
import signal
import threading
import time

import pytest
import yaml

from tests.study.test_study import STUDY

pytestmark = pytest.mark.slow
SHORT = {"train.iterations": 1, "evaluate.every": 1, "checkpoint.every": 1}
LONG = {"train.iterations": 100, "evaluate.every": 0, "checkpoint.every": 100}


def written(tmp_path, **changes):
    path = tmp_path / "half.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"overrides": SHORT} | changes, sort_keys=False))
    return path


def test_the_others_end_where_a_run_fails_and_what_was_left_is_run_the_next_time(inside, tmp_path):
    broken = {"whole": {}, "half": {"rollout.prompts": str(tmp_path / "no.txt")}}
    asked = ("study", written(tmp_path, arms=broken), "--output", tmp_path / "out", "--jobs", "2")
    code, text, err = inside(*asked)
    assert code == 2 and err.count("error: ") == 1 and "shapes/half/seed-1: " in err and "no.txt" in err
    assert text.count("run ") == 2, "no other is begun"
    results = tmp_path / "out" / "results.jsonl"
    assert {record["arm"] for record in map(json.loads, results.read_text().splitlines())} == {"whole"}
    log = tmp_path / "out" / "shapes" / "whole" / "seed-1.log"
    assert "written: " in log.read_text()

    written(tmp_path)
    code, text, err = inside(*asked, "--seed", "1")
    assert code == 0 and "run 1 of 1: shapes/half/seed-1" in text, err
    ends = {record["arm"]: record for record in map(json.loads, results.read_text().splitlines())}
    assert ends["half"]["commit"] == ends["whole"]["commit"] and ends["whole"]["eval/images"] > 0


def test_ctrl_c_stops_all_of_them(inside, tmp_path):
    study, output = written(tmp_path, overrides=LONG), tmp_path / "out"
    runs = [output / "shapes" / arm / "seed-1" for arm in STUDY["arms"]]

    def interrupt():
        ends = time.monotonic() + 240
        while time.monotonic() < ends:
            if all((run / "metrics.jsonl").exists() for run in runs):
                return os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    threading.Thread(target=interrupt).start()
    code, text, err = inside("study", study, "--output", output, "--seed", "1", "--jobs", "2")
    assert code == 130 and "stopped; give the same command again" in text, err
    for run in runs:
        assert list((run / "checkpoints").iterdir()), "a run that is stopped leaves a checkpoint"
        assert "finishing this iteration" in run.with_name("seed-1.log").read_text()
