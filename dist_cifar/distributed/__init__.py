"""The launch environment, the rendezvous, the collectives and the failure detector. Only this package and `strategy`
import torch.distributed."""
