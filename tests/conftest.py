import os

import torch
from hypothesis import settings

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Two threads on a busy two-core machine are ten times slower than one.
torch.set_num_threads(1)

# The same examples in every run, and with `--hypothesis-profile=exhaustive` more of them.
settings.register_profile("fast", max_examples=40, derandomize=True, deadline=None)
settings.register_profile("exhaustive", max_examples=300, derandomize=True, deadline=None)
settings.load_profile("fast")
