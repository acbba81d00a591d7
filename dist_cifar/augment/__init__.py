"""Training augmentation: `policy` draws the parameters of a batch, `kernel` applies them fast, `reference` says what
they mean.

The parameters of an image depend on (seed, epoch, index of the image) alone. Nothing here knows of ranks.
"""
