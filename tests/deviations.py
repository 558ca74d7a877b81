"""Prints the largest |library - reference| in bits per order, over all functionals and routes.

Run as `python tests/deviations.py`; the draws are those of test_functionals.py.
"""

import torch
from test_functionals import ALPHAS, FUNCTIONALS, deviation, routes


def worst(alpha, dtype):
    cases = [(of, method) for of in FUNCTIONALS.values() for _, method in routes(alpha)]
    return max(deviation(of, alpha, method, dtype) for of, method in cases)


if __name__ == "__main__":
    print("   alpha   float64   float32")
    for alpha in ALPHAS:
        # below order one, rounding a singular matrix to float32 changes its entropy
        float32 = f"{worst(alpha, torch.float32):9.1e}" if alpha >= 1 else "        -"
        print(f"{alpha:8} {worst(alpha, torch.float64):9.1e} {float32}")
