"""`verify`: what it runs and where, what it compares, and that it finds one wrong bit of one gradient."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_cifar.config import to_yaml
from dist_cifar.distributed.kv_store import KeyValueStore
from dist_cifar.distributed.launch_env import DistEnv
from dist_cifar.errors import ConfigError, LaunchError, TrainingError
from dist_cifar.tools.verify import compare, plan, verify
from dist_cifar.tools.verify.compare import Difference, Row, first_difference
from dist_cifar.tools.verify.plan import Agent, Placement, Segment, Trial, place_ranks, plan_trials
from dist_cifar.tools.verify.ranks import Tail, log_path, segment_failure

BIN = Path(sys.executable).parent
TIMEOUT_SECONDS = 900

# --- what is run -------------------------------------------------------------------------------------------------


def test_world_sizes_are_read():
    assert plan.parse_world_sizes("1,2,4", 8) == [1, 2, 4]
    assert plan.parse_world_sizes("8, 1", 8) == [8, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,9", "--world-sizes: 9 was given; strategy.virtual_ranks=8 allows 1 to 8"),
        ("0", "--world-sizes: 0 was given"),
        ("-1", "--world-sizes: -1 was given"),
        ("1,2,1", "1 is given twice"),
        ("", "'' is not a list of whole numbers"),
        ("1,,2", "is not a list"),
        ("two", "'two' is not a list"),
    ],
)
def test_bad_world_sizes_are_refused(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan.parse_world_sizes(text, 8)


def test_trials_of_the_default():
    *single, chain = plan_trials([1, 2, 4], 20)
    assert [trial.name for trial in single] == ["world size 1", "world size 2", "world size 4"]
    assert [trial.segments for trial in single] == [(Segment(world_size=size, until_step=20),) for size in (1, 2, 4)]
    assert chain.name == "chain 4 -> 2 -> 1 -> 4"
    assert plan.checkpoint_every_steps(3, 20) == 4
    assert [segment.until_step for segment in chain.segments] == [5, 10, 15, 20]
    assert len({trial.directory for trial in [*single, chain]}) == 4


@given(
    sizes=st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, unique=True),
    steps=st.integers(min_value=1, max_value=400),
)
def test_every_segment_of_a_chain_finds_a_checkpoint_that_the_one_before_it_has_left(sizes, steps):
    if steps < 2 * (len(sizes) + 1):
        with pytest.raises(ConfigError, match=rf"--steps: {steps} steps are too few"):
            plan_trials(sizes, steps)
        return
    segments = plan_trials(sizes, steps)[-1].segments
    every = plan.checkpoint_every_steps(len(sizes), steps)
    stops = [segment.until_step for segment in segments]
    assert [segment.world_size for segment in segments] == [*sorted(sizes, reverse=True), max(sizes)]
    assert stops == sorted(set(stops)) and stops[-1] == steps
    found = 0
    for stop in stops:
        saved = (stop - 1) // every * every  # that of the last step itself may come too late
        assert saved > found
        found = saved
    assert every == 1 or all(stop % every for stop in stops[:-1])


def test_config_is_made_exact(tiny):
    tracked = ("tracking.wandb=auto", "tracking.also=[tensorboard]")
    config = plan.verified_config(tiny("strategy.name=ddp", "train.max_steps=3", "run.seed=5", *tracked))
    assert config.strategy.name == "exact" and config.train.max_steps is None and config.run.log_digests
    assert config.tracking.wandb == "disabled" and config.tracking.also == ()
    assert config.run.seed == 5 and config.batch.global_size == 16  # the user's


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["batch.global_size=null", "batch.per_rank_size=8"], {}, "set batch.global_size"),
        (["batch.global_size=12"], {}, "cannot be shared equally"),
        ([], {"steps": 0}, "--steps: must be >= 1"),
        ([], {"steps": 5}, "--steps: 5 steps are too few for the chain 2 -> 1 -> 2; write at least 6"),
        ([], {"world_sizes": "1,9"}, "--world-sizes: 9"),
        ([], {"json_file": Path("/nowhere/x.json")}, "--json /nowhere/x.json: its folder does not exist"),
        ([], {"directory": Path(__file__).parent}, "is not empty"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(overrides, options, message, tiny):
    config = tiny(*overrides)
    with pytest.raises(ConfigError, match=re.escape(message)):
        verify(config, DistEnv(), **{"world_sizes": "1,2", "steps": 20} | options)


# --- where it is run ---------------------------------------------------------------------------------------------

CPU = Agent(pool="a", gpus=0)


def test_one_process_takes_all_ranks():
    assert place_ranks(4, [CPU]) == [Placement(agent=0, local_rank=rank, local_world_size=4) for rank in range(4)]


def test_ranks_have_processes_of_their_own_while_there_are_enough():
    agents = [Agent(pool=pool, gpus=2) for pool in "aabb"]
    assert [place.agent for place in place_ranks(2, agents)] == [0, 1]
    assert place_ranks(4, agents) == [
        Placement(agent=agent, local_rank=local, local_world_size=2) for agent, local in enumerate([0, 1, 0, 1])
    ]


def test_processes_share_more_ranks_than_there_are_processes():
    places = place_ranks(8, [Agent(pool=pool, gpus=0) for pool in "ab"])
    assert [place.agent for place in places] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [place.local_rank for place in places] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_nodes_may_take_turns():
    places = place_ranks(4, [Agent(pool=pool, gpus=2) for pool in "abab"])
    assert [place.local_rank for place in places] == [0, 0, 1, 1]


def test_too_few_gpus_are_an_error_that_says_what_to_start():
    alone = [Agent(pool="node7", gpus=2)]
    assert [place.local_rank for place in place_ranks(2, alone)] == [0, 1]
    with pytest.raises(LaunchError, match=r"world size 4 has 4 ranks on node7, which has 2 GPUs; start .*torchrun"):
        place_ranks(4, alone)
    own = [Agent(pool=f"node7 (task {task})", gpus=1) for task in range(2)]
    assert [place.local_rank for place in place_ranks(2, own)] == [0, 0]
    with pytest.raises(LaunchError, match=r"2 ranks on node7 \(task 0\), which has 1 GPUs"):
        place_ranks(4, own)


def test_default_world_sizes():
    assert plan.default_world_sizes(8, [CPU]) == [1, 2, 4]
    assert plan.default_world_sizes(2, [CPU]) == [1, 2]
    assert plan.default_world_sizes(16, [Agent(pool=pool, gpus=4) for pool in "aaaabbbb"]) == [1, 2, 4, 8]
    assert plan.default_world_sizes(8, [Agent(pool="a", gpus=2)]) == [1, 2]


def test_the_store_carries_values_between_processes_that_have_no_process_group():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stores: dict[int, KeyValueStore] = {}

    def join(rank: int) -> None:
        stores[rank] = KeyValueStore(
            DistEnv(rank=rank, world_size=2, local_rank=rank, local_world_size=2, master_port=port)
        )

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stores[1].get("word") is None
    stores[0].set("word", "go")
    assert stores[1].get("word") == "go"
    stores[1].set("word", "")
    assert stores[0].get("word") == ""


# --- what is compared --------------------------------------------------------------------------------------------


def rows(*values: dict[str, str], start: int = 1) -> list[Row]:
    return [Row(step=start + i, values=value) for i, value in enumerate(values)]


ONE, TWO, THREE = {"w": "1", "b": "x"}, {"w": "2", "b": "x"}, {"w": "3", "b": "x"}
GOLDEN = rows(ONE, TWO, THREE)


def test_equal_runs_have_no_difference():
    again = [*rows(ONE, TWO), *rows(TWO, THREE, {"w": "9"}, start=2)]  # step 2 twice, and one beyond the last
    assert first_difference({"first": GOLDEN, "chain": again}, 3) is None


def test_the_first_step_and_tensor_that_differ_are_named():
    wrong = rows(ONE, TWO | {"b": "y"}, {"w": "4", "b": "z"})
    late = rows(ONE, TWO, {"w": "4", "b": "x"})
    found = first_difference({"first": GOLDEN, "late": late, "wrong": wrong}, 3)
    assert found == Difference(step=2, names={"wrong": ["b"]})
    assert compare.describe(found, "first") == "step 2: wrong differs from first in b"
    found = first_difference({"first": GOLDEN, "late": late}, 3)
    assert found == Difference(step=3, names={"late": ["w"]})


def test_all_runs_that_differ_at_that_step_are_named():
    found = first_difference({"first": GOLDEN, "a": rows(TWO, TWO), "b": rows({"w": "1"}, TWO)}, 3)
    assert found == Difference(step=1, names={"a": ["w"], "b": ["b"]})


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_missing_step_is_a_difference(missing):
    others = [row for row in GOLDEN if row.step != missing]
    assert first_difference({"first": GOLDEN, "a": others}, 3) == Difference(step=missing, names={"a": []})
    found = first_difference({"first": others, "a": GOLDEN}, 3)
    assert found == Difference(step=missing, names={"first": []})
    assert compare.describe(found, "first") == f"step {missing}: first has no digests of it"


@pytest.mark.parametrize("order", [1, -1])
def test_every_replay_of_a_step_counts(order):
    again = [*rows(ONE), *[*rows(TWO, start=2), *rows(TWO | {"b": "y"}, start=2)][::order], *rows(THREE, start=3)]
    assert first_difference({"first": GOLDEN, "chain": again}, 3) == Difference(step=2, names={"chain": ["b"]})
    assert first_difference({"chain": again}, 3) == Difference(step=2, names={"chain": ["b"]})


def test_a_tensor_that_only_one_of_them_has_differs():
    assert first_difference({"first": rows(ONE), "a": rows(ONE | {"c": "1"})}, 1).names == {"a": ["c"]}
    assert first_difference({"first": rows(ONE), "a": rows({"w": "1"})}, 1).names == {"a": ["b"]}


def test_many_names_are_cut():
    text = compare.describe(Difference(step=1, names={"a": [f"t{i}" for i in range(9)]}), "first")
    assert text == "step 1: a differs from first in t0, t1, t2, t3, t4 and 4 more"


def test_totals_are_compared_to_the_last_bit_and_a_nan_equals_itself():
    line = {"step": 1, "totals": {"loss_sum": 0.1, "samples": 2.0, "norm_sum": float("nan")}, "digests": {"w": "1"}}
    row = compare.parse_row(json.dumps(line))
    assert row == compare.parse_row(json.dumps(line))
    line["totals"]["loss_sum"] += 2**-56
    other = compare.parse_row(json.dumps(line))
    assert first_difference({"first": [row], "a": [other]}, 1) == Difference(step=1, names={"a": ["total loss_sum"]})


def test_outcome_counts_what_was_compared_and_done_again():
    trial = Trial(
        name="chain 2 -> 2", segments=(Segment(world_size=2, until_step=2), Segment(world_size=2, until_step=3))
    )
    again = [*rows(ONE, TWO), *rows(TWO, THREE, THREE, start=2)]
    good = compare.outcome(trial, again, GOLDEN, steps=3, seconds=1.0)
    assert (good.steps, good.replayed_steps, good.equal) == (3, 1, True)
    assert good.world_sizes == [2, 2] and good.digest == compare.state_digest(GOLDEN, 3)
    bad = compare.outcome(trial, rows(ONE, TWO, TWO), GOLDEN, steps=3, seconds=1.0)
    assert not bad.equal and bad.digest not in ("", good.digest)
    assert re.search(
        r"chain 2 -> 2 +3 +1 +1\.0 +[0-9a-f]{16}  yes\nchain 2 -> 2 +3 .* NO\n", compare.table([good, bad])
    )


def test_a_chain_that_does_not_resume_is_found_out():
    trial = plan_trials([2], 4)[-1]
    compare.require_resumed(trial, [GOLDEN, GOLDEN[1:]], 3)
    with pytest.raises(TrainingError, match="2 ranks began at step 1"):
        compare.require_resumed(trial, [GOLDEN, list(GOLDEN)], 3)
    with pytest.raises(TrainingError, match="began at step 3, after the 2 steps"):
        compare.require_resumed(trial, [GOLDEN, GOLDEN[2:]], 2)


def test_a_line_counts_when_it_is_whole(tmp_path):
    path = tmp_path / "digests.jsonl"
    line = json.dumps({"step": 1, "totals": {"loss_sum": 0.0}, "digests": {}}) + "\n"
    tail = Tail(path)
    assert tail.read() == []
    for text, count in ((line[:9], 0), (line[9:], 1), (line + line[:-1], 2), ("\n", 3), ("", 3)):
        with open(path, "a") as file:
            file.write(text)
        assert len(tail.read()) == count


@pytest.mark.parametrize(
    ("logs", "ended", "message", "code"),
    [
        (
            ["x\ndist_cifar: error: zero\n", "dist_cifar: error: one\n"],
            {1: 74, 0: 2},
            "rank 1 .* code 74 .* 4: zero$",
            74,
        ),
        (["", "dist_cifar: error: one\n"], {1: 2}, "rank 1 of 2 ended with exit code 2 before step 4: one$", 2),
        (["", "Traceback\nKeyError: 3\n"], {1: 70}, "rank 1 .* KeyError: 3$", 70),
        (["train step 1\n", ""], {0: -9}, "rank 0 of 2 was killed by SIGKILL .* no rank says why", 70),
    ],
)
def test_a_segment_that_fails_says_which_rank_was_first_and_why(logs, ended, message, code, tmp_path):
    trial = plan_trials([2], 4)[0]
    for rank, text in enumerate(logs):
        log_path(tmp_path, trial, 0, rank).write_text(text)
    error = segment_failure(tmp_path, trial, 0, ended)
    assert re.search(f"^verify: world size 2: {message}", str(error)) and error.exit_code == code


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny, tmp_path):
    """Another strategy, as most configs have; and without clipping, so that a wrong gradient changes no other."""
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(tiny("strategy.name=ddp", "optimizer.max_grad_norm=null")))
    return path


def command(config: Path, tmp_path: Path, options: str) -> str:
    """The arguments of a `verify` that writes to `tmp_path`."""
    return f"dist_cifar verify --config {config} --dir {tmp_path}/runs --json {tmp_path}/result.json {options}"


def start(command: str, **extra: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **extra}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        shlex.split(command), env=environ, text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err


def ranks_below(directory: Path) -> list[int]:
    """Processes that train in a run directory below `directory`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"run.dir={directory}/" in (path / "cmdline").read_text():
                found.append(int(path.name))
        except OSError:  # it has just ended
            continue
    return found


def test_bad_input_is_one_line_and_exits_with_2(config):
    code, out, err = finish(start(f"python -m dist_cifar verify --config {config} --world-sizes 1,9"))
    assert (code, out) == (2, "")
    assert err.splitlines() == ["dist_cifar: error: --world-sizes: 9 was given; strategy.virtual_ranks=8 allows 1 to 8"]


@pytest.mark.slow
def test_all_is_equal(config, tmp_path):
    directory, result = tmp_path / "runs", tmp_path / "result.json"
    code, out, err = finish(start("python -m " + command(config, tmp_path, "--world-sizes 1,2 --steps 6")))
    assert code == 0, out + err
    assert "strategy exact (the config says ddp)" in out
    for trial in ("world size 1", "world size 2", "chain 2 -> 1 -> 2"):
        assert re.search(rf"(?m)^{trial} +6 .* yes$", out)
    digest = re.search(r"(?m)^all equal: ([0-9a-f]{16})$", out)[1]
    assert "torch=" in out and "threads=1" in out and "device=cpu" in out
    assert not directory.exists() and ranks_below(directory) == []
    facts = json.loads(result.read_text())
    assert facts["equal"] and facts["digest"] == digest and facts["difference"] is None
    assert [trial["digest"] for trial in facts["trials"]] == [digest] * 3
    assert facts["trials"][2]["world_sizes"] == [2, 1, 2] and facts["trials"][2]["replayed_steps"] > 0


@pytest.mark.slow
def test_processes_of_torchrun_share_the_ranks(config, tmp_path):
    """Two processes: one of them idle at world size 1, and each with two ranks at world size 4."""
    directory, result = tmp_path / "runs", tmp_path / "result.json"
    code, out, err = finish(
        start("torchrun --standalone --nproc-per-node 2 -m " + command(config, tmp_path, "--world-sizes 1,4 --steps 6"))
    )
    assert code == 0, out + err
    assert out.count("all equal: ") == 1 and "processes  2, " in out
    assert [trial["world_sizes"] for trial in json.loads(result.read_text())["trials"]] == [[1], [4], [4, 1, 4]]
    assert not directory.exists() and ranks_below(directory) == []


_WRONG_BIT = """
import os
if os.environ.get("WORLD_SIZE") == "2":
    import torch
    calls, total_norm = [], torch.nn.utils.get_total_norm
    def wrong(gradients, *arguments, **options):
        calls.append(0)
        if len(calls) == 3:
            gradients[-1].view(torch.int32)[0] ^= 1 << 16
        return total_norm(gradients, *arguments, **options)
    torch.nn.utils.get_total_norm = wrong
"""
"""Flips one bit of one number of the last gradient in the third step: one above those that Adam may round away, and on
all ranks alike, so that they still agree."""


@pytest.mark.slow
def test_one_wrong_bit_of_one_gradient_at_one_world_size_is_found(config, tmp_path):
    shim, directory, result = tmp_path / "shim", tmp_path / "runs", tmp_path / "result.json"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(_WRONG_BIT)
    code, out, err = finish(
        start(
            "python -m " + command(config, tmp_path, "--world-sizes 1,2 --steps 6"),
            PYTHONPATH=f"{shim}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        )
    )
    assert code == 70, out + err
    (line,) = err.splitlines()
    assert line.startswith("dist_cifar: error: verify: step 3: world size 2 differs from world size 1 in fc.bias")
    assert re.search(r"(?m)^world size 1 .* yes$", out) and re.search(r"(?m)^world size 2 .* NO$", out)
    assert "all equal" not in out and f"kept: {directory}" in out and (directory / "world-size-2").is_dir()
    facts = json.loads(result.read_text())
    assert not facts["equal"] and facts["difference"]["step"] == 3
    assert "fc.bias.exp_avg" in facts["difference"]["names"]["world size 2"]
    assert "fc.weight" not in facts["difference"]["names"]["world size 2"]


def test_the_shell_of_a_job_of_several_tasks_starts_its_own_ranks(config, tmp_path):
    """Where `train` would take itself for the only rank, and refuses."""
    code, out, err = finish(
        start("python -m " + command(config, tmp_path, "--world-sizes 1 --steps 4"), SLURM_JOB_ID="7", SLURM_NTASKS="4")
    )
    assert code == 0 and "all equal: " in out, out + err


def test_a_trial_that_cannot_run_shows_the_error_of_its_rank_0(config, tmp_path):
    code, out, err = finish(
        start("python -m " + command(config, tmp_path, "--world-sizes 1 data.source=folder data.root=/nowhere"))
    )
    assert code == 74, out + err
    (line,) = err.splitlines()
    assert "verify: world size 1: rank 0 of 1 ended with exit code 74 before step 20: " in line and "/nowhere" in line
    assert f"kept: {tmp_path}/runs" in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_rank_outlives_it(number, code, config, tmp_path):
    process = start("python -m " + command(config, tmp_path, "--world-sizes 2"))
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(ranks_below(tmp_path / "runs")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    returned, _, err = finish(process)
    assert returned == code and "Traceback" not in err
    while ranks_below(tmp_path / "runs") and time.monotonic() < deadline:  # of SIGKILL: the kernel ends them
        time.sleep(0.01)
    assert ranks_below(tmp_path / "runs") == []
