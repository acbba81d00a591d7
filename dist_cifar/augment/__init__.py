"""Training augmentation: `policy` draws the parameters of a batch, `reference` applies them.

The parameters of an image depend on (seed, epoch, index of the image) alone. Nothing here knows of ranks.
"""
