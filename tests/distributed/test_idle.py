from __future__ import annotations

import pytest

from dist_cifar.distributed.idle import idle_line


@pytest.mark.parametrize(
    ("available", "used", "ranks", "ranks_here", "expected"),
    [
        (2, 2, 2, 2, None),
        (2, 1, 1, 1, "1 of 2 cores; 2 ranks would use more of them: dist-cifar train --ranks 2"),
        (3, 1, 1, 1, "2 of 3 cores; 3 ranks would use more of them: dist-cifar train --ranks 3"),
        (3, 2, 2, 2, None),  # less than one for each rank
        (7, 2, 2, 2, "5 of 7 cores; 4 ranks would use more of them: dist-cifar train --ranks 4"),
        (64, 8, 8, 8, "56 of 64 cores; 8 ranks are the most here for strategy.virtual_ranks=8"),
        (8, 4, 1, 1, "4 of 8 cores; 2 ranks would use more of them: dist-cifar train --ranks 2"),  # of 4 threads each
        (8, 2, 4, 2, "6 of 8 cores; 8 ranks would use more of them"),  # on two nodes
        (1, 2, 2, 2, None),  # more ranks than cores
    ],
)
def test_what_is_idle_and_how_many_ranks_would_use_it(available, used, ranks, ranks_here, expected):
    line = idle_line(
        "core",
        available=available,
        used=used,
        ranks=ranks,
        ranks_here=ranks_here,
        shared=8,
        equally=False,
        limit="strategy.virtual_ranks=8",
    )
    assert line == expected


def test_what_has_to_be_shared_equally():
    line = idle_line("GPU", available=7, used=1, ranks=1, ranks_here=1, shared=8, equally=True, limit="a batch of 8")
    assert line == "6 of 7 GPUs; 4 ranks would use more of them: dist-cifar train --ranks 4"
