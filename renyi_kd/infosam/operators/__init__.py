"""The parts of the loss that have a gradient of their own, for speed.

Each is a `torch.library.custom_op` in the namespace `renyi_kd`, which `torch.compile` does not look
into. The PyTorch form here serves every device. Of scores, batch_gram and joint a Triton kernel in
`renyi_kd/_triton.py` takes its place on CUDA, and the PyTorch form is its reference. The files do
not import each other: folding, scores, batch_gram, joint.
"""
