"""`python -m dist_cifar`, and the command `dist-cifar`."""

import sys

from dist_cifar import stopping


def run() -> int:
    """Runs the command line of this process; signals are heeded before anything else is imported."""
    return stopping.run_stoppable(_main)


def _main() -> int:
    from dist_cifar.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
