"""A device for dry runs: the CPU, with a clock and times that are made up."""

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

    def rates(self, seconds):
        product = {
            "op": "roofline",
            "case": "product",
            "implementation": "torch.matmul",
            "tflops": 100.0,
        }
        copy = {
            "op": "roofline",
            "case": "copy",
            "dtype": "float32",
            "implementation": "Tensor.copy_",
            "gb_per_s": 1000,
        }
        return [*({**product, "dtype": name} for name in DTYPES), copy]

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
