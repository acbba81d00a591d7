"""The Python API: what `import dist_cifar` offers to programs and notebooks, built on the rooms below it."""
