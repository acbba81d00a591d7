"""Train the same CIFAR-10 model on any number of GPUs, at the speed of the hardware, and prove it.

Importing the package imports no torch: each module imports what it needs, and only when it is used.
"""

__version__ = "0.1.0"
