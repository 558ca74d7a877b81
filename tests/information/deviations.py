"""Prints the largest |library - reference| in bits of each order, over all functionals and routes.

Run as `python tests/information/deviations.py`. The draws are those of the tests.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch
from functionals import ALPHAS, FUNCTIONALS, deviation, routes


def worst(alpha, dtype):
    cases = [(of, method) for of in FUNCTIONALS.values() for _, method in routes(alpha)]
    return max(deviation(of, alpha, method, dtype) for of, method in cases)


if __name__ == "__main__":
    print("   alpha   float64   float32")
    for alpha in ALPHAS:
        # below order one, rounding a singular matrix to float32 changes its entropy
        float32 = f"{worst(alpha, torch.float32):9.1e}" if alpha >= 1 else "        -"
        print(f"{alpha:8} {worst(alpha, torch.float64):9.1e} {float32}")
