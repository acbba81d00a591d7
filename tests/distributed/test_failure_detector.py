"""The failure detector's decision: which rank failed first, from what the ranks answer."""

from __future__ import annotations

import pytest

from dist_cifar.distributed.failure_detector import Answer, Failure, Position, conclude, is_lost_peer, odd_ranks
from dist_cifar.distributed.processes import Identity


def answers(*positions: tuple[int, str] | None, stuck: tuple[int, ...] = ()) -> list[Answer | None]:
    return [
        None
        if place is None
        else Answer(
            position=Position(count=place[0], name=place[1], step=7),
            lost=None if rank in stuck else "gloo/ said so",
            where="x.py:1",
        )
        for rank, place in enumerate(positions)
    ]


VOTE, SUM = (5, "vote"), (5, "sum")


@pytest.mark.parametrize(
    ("given", "unhealthy", "rank", "what"),
    [
        (answers(VOTE, None, VOTE), {1: "its process is gone"}, 1, "was killed or lost"),
        (answers(VOTE, VOTE, None), {}, 2, "was killed or lost"),
        (answers(VOTE, None, None), {2: "its process is stopped"}, 2, "was killed or lost"),
        (answers(VOTE, VOTE, SUM), {}, 2, "left the order of the collectives"),
        (answers(SUM, VOTE, VOTE), {}, 0, "left the order of the collectives"),
        (answers(VOTE, (4, "vote"), VOTE, stuck=(1,)), {}, 1, "hung"),
        (answers(VOTE, VOTE, VOTE, stuck=(2,)), {}, 2, "hung"),
        (answers(VOTE, SUM, stuck=(1,)), {}, 1, "hung"),
        (answers(VOTE, (4, "sum")), {}, 1, "or another one left the order of the collectives"),
        (answers(VOTE, VOTE, VOTE), {}, None, "lost the network between its ranks"),
        (answers(VOTE, VOTE, stuck=(0, 1)), {}, None, "lost the network between its ranks"),
    ],
)
def test_the_decision(given, unhealthy, rank, what):
    for by in (rank for rank, answer in enumerate(given) if answer is not None):
        failure = conclude(given, unhealthy, by=by, expired=True)
        assert failure is not None and (failure.rank, failure.what, failure.step) == (rank, what, 7)
        assert set(unhealthy) <= set(failure.lost)
        assert set(failure.lost) <= {rank for rank, answer in enumerate(given) if answer is None}


def test_nobody_is_judged_before_the_time_is_over_unless_it_is_known_to_be_gone():
    assert conclude(answers(VOTE, None, VOTE), {}, by=0, expired=False) is None
    assert conclude(answers(VOTE, VOTE, VOTE, stuck=(1,)), {}, by=0, expired=False) is None
    known = conclude(answers(VOTE, None, None), {2: "its process is gone"}, by=0, expired=False)
    assert known is not None and (known.rank, known.lost) == (2, (2,))  # rank 1 may still answer


def test_the_majority_is_right():
    assert odd_ranks(["a", "a", "a"]) == []
    assert odd_ranks(["b", "a", "a"]) == [0]
    assert odd_ranks(["a", "b"]) == [0, 1]
    assert odd_ranks(["a", "a", "b", "b"]) == [0, 1, 2, 3]


def test_errors_of_other_ranks_are_told_from_own_ones():
    assert is_lost_peer(RuntimeError("[x/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed"))
    assert is_lost_peer(RuntimeError("Application timeout caused pair closure"))
    assert not is_lost_peer(RuntimeError("CUDA error: out of memory"))
    assert not is_lost_peer(ValueError("gloo/"))


def test_a_failure_says_who_and_why():
    identity = Identity(host="n1", pid=12, boot="", pid_namespace=0)
    failure = Failure(rank=0, what="failed", reason="ValueError: x", by=0, step=None)
    assert failure.sentence([identity]) == "rank 0 (n1, pid 12) failed at the start: ValueError: x"
