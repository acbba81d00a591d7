"""The place of this process in the job, and the collectives. With `strategy/`, the only users of torch.distributed."""
