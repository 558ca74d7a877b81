"""The parts of the loss that have a gradient of their own, for speed.

Each is a `torch.library.custom_op` in the namespace `renyi_kd`, which `torch.compile` does not look
into. The PyTorch form here serves every device. On CUDA a Triton kernel of `renyi_kd/_triton` takes
its place, and has it as its reference. The files do not import each other: folding, scores,
batch_gram, joint.
"""
