"""One image on several devices: sequence parallelism on torch.distributed."""
