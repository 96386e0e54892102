"""Processes, devices, sharding. The only importer of accelerate, deepspeed and torch.distributed.

`launch` needs no torch and is imported by the supervisor; `runtime`, `zero` and `engine` are used inside the ranks.
"""
