"""The parallelism of a spec on torch.distributed: one axis per file, and a local model that knows of none."""
