"""A device for dry runs: the CPU, with a clock and times that are made up.

python tests/packaging/stand_in.py -m benchmarks.gpu OPTIONS      what the options say, there
"""

from __future__ import annotations

import time

from ovseg_benchmarks.device import DTYPES
from ovseg_benchmarks.registry import FUSED, Case


class StandIn:
    torch_name = "cpu"

    def __init__(self, pause: float = 0.0, took: float = 1.0, backends=("cpu",)):
        self.pause, self.took, self.now, self._backends, self.freed = pause, took, 0.0, backends, 0

    def clock(self) -> float:
        return self.now

    def milliseconds(self, function, seconds):
        time.sleep(self.pause)
        self.now += self.took
        function()
        return {"p20": 1.0, "median": 2.0, "p80": 3.0}

    def extra_bytes(self, function):
        function()
        return 3 * 2**20

    def settle(self):
        self.freed += 1

    def backends(self):
        return self._backends

    def calls(self, function, seconds):
        self.now += self.took
        function()
        return {"host_us": 20.0, "wall_us": 50.0}

    def replay_us(self, function, seconds):
        function()
        return 40.0

    def kernels(self, function):
        self.now += self.took
        function()
        return [
            {"name": "product_kernel", "count": 2, "us": 30.0},
            {"name": "sum_kernel", "count": 1, "us": 1.5},
        ]

    def rates(self, seconds):
        product = {"op": "roofline", "case": "product", "implementation": "torch.matmul"}
        copy = {"op": "roofline", "case": "copy", "implementation": "Tensor.copy_"}
        yield from ({**product, "rate": name, "tflops": 100.0} for name in (*DTYPES, "tf32"))
        yield {**copy, "rate": "copy", "gb_per_s": 1000}
        yield {**copy, "rate": "L2 read", "gb_per_s": 5000}
        yield {"op": "roofline", "rate": "launch", "host_us": 2.0, "wall_us": 2.1, "replay_us": 1.1}

    def environment(self):
        return {"op": "environment", "device": "none"}


CASES = (
    Case(
        "patch_text_similarity",
        "small",
        {"B": 3, "T": 5, "N": 7, "D": 8},
        {"temperature": 0.1},
        only=(FUSED, "eager"),
        dtypes=("bfloat16", "float32"),
    ),
    Case(
        "upsample_argmax",
        "small",
        {"C": 4, "h": 3, "H": 9},
        only=(FUSED, "eager", "torch.compile", "eager, 10 classes at a time"),
        compiled=True,
    ),
    Case("contrastive_loss", "small", {"B": 9, "D": 8}, only=(FUSED, "eager")),
)
