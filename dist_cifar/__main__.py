"""`python -m dist_cifar`."""

import sys

from dist_cifar.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
