"""The front door: `accelerate launch dist_cifar/train.py [key=value ...]`, and so for `torchrun` and `python`.

Outside a clone it is a module of the installed package: `accelerate launch -m dist_cifar.train [key=value ...]`.

The training loop is in `dist_cifar/trainer.py`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        # Started as a file, its folder is first on the path, unless Python was told otherwise, and the package may not
        # be installed.
        sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[1])]
    from dist_cifar import stopping

    def run() -> int:
        """Runs the command; signals are heeded before anything else is imported."""
        from dist_cifar.cli import main

        return main(["train", *sys.argv[1:]])

    sys.exit(stopping.run_stoppable(run))
elif __name__ == "dist_cifar.train":
    # Imported, the module would hide the package's function of this name: `import dist_cifar.train` gives the function.
    from dist_cifar.api.training import train

    sys.modules[__name__] = train  # type: ignore[assignment]
