"""Machine and commit go into every --benchmark-json."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_benchmark_update_machine_info(config, machine_info):
    import crd_machine
    import torch

    machine_info["crd"] = crd_machine.describe("cuda" if torch.cuda.is_available() else "cpu")
