from __future__ import annotations

import pytest

from dist_cifar.distributed.idle import idle_line


@pytest.mark.parametrize(
    ("available", "used", "ranks", "ranks_here", "expected"),
    [
        (2, 2, 2, 2, None),
        (2, 1, 1, 1, "1 of 2 cores; 2 ranks would use more of them: dist-cifar train --ranks 2"),
        (3, 1, 1, 1, "2 of 3 cores; 2 ranks would use more of them: dist-cifar train --ranks 2"),
        (3, 2, 2, 2, None),  # 3 ranks would not divide 8 virtual ones
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
        limit="strategy.virtual_ranks=8",
    )
    assert line == expected
