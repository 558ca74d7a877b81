import os

import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Two threads on a busy two-core machine are ten times slower than one.
torch.set_num_threads(1)
