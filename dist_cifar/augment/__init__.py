"""Training augmentation: `params` samples the parameters of a batch, `cpu` and `triton_gpu` apply them fast, `backend`
chooses between the two, `reference` defines what they compute. `cpu_pass` is what `cpu` compiles; `resolution` has the
sizes of a run's images.

The parameters of an image depend on (seed, epoch, index of the image) alone. Nothing here knows of ranks.
"""
