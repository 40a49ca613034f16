"""Operators: one folder or file a family, with its schema, reference, fake, autograd, FLOPs, sharding and `supports()`.

Imports torch and nothing else. `torch.ops.flashmoe.*` are the operators; the public functions are what to call.
"""
