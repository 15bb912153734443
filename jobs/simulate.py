"""Simulated runs with random faults, without Ray, torch or any cluster: python jobs/simulate.py --seeds 0:2000"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("evenkeel") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from evenkeel.sim.swarm import main

if __name__ == "__main__":
    sys.exit(main())
