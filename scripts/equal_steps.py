#!/usr/bin/env python
"""Trains our network and its peers for equally many steps, and compares their validation losses.

Prints a table and writes it, all figures as JSON, and a plot. The same command goes on with what was stopped:

    python scripts/equal_steps.py --data shared/data/cifar10 --output runs/equal-steps
"""

import tyro
from benchmarks.equal_steps import EqualSteps, compare

if __name__ == "__main__":
    print(compare(tyro.cli(EqualSteps)))
