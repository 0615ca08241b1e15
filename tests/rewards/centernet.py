"""A small detector of COCO's 80 classes with published weights, for tests: the CenterNet that npm's
`@vladmandic/human` carries (MIT License), a TensorFlow.js graph, run by torch.

A graph is JSON, its weights are the bytes of its tensors in a row. Tensors are (N, height, width, channels).
"""

from __future__ import annotations

import base64
import json
import math
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, max_pool2d, pad

from crd_fast.prompts.coco import CLASSES

PACKAGE = "@vladmandic/human@3.3.6"
SIDE, STRIDE = 512, 4  # pixels of the input, and of each place of the output
OUTPUTS = ("tower_0/keypoints", "tower_0/wh")


def fetch(folder: Path) -> Path:
    """The folder with the graph, by npm's client. Skips the test where that cannot be had."""
    if not (npm := shutil.which("npm")):
        pytest.skip("needs npm")
    command = [npm, "pack", "--silent", PACKAGE]
    try:
        packed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm does not bring {PACKAGE}")
    if packed.returncode:
        pytest.skip(f"npm does not bring {PACKAGE}")
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        wanted = [f"package/models/centernet.{kind}" for kind in ("json", "bin")]
        archive.extractall(folder, [archive.getmember(name) for name in wanted], filter="data")
    return folder / "package/models"


class CenterNet:
    """Detections as `geneval.judge` takes them, without colours."""

    def __init__(self, folder: Path):
        model = json.loads((folder / "centernet.json").read_text())
        raw, start = (folder / "centernet.bin").read_bytes(), 0
        self.nodes = {node["name"]: node for node in model["modelTopology"]["node"]}
        self.constants = {}
        for weight in model["weightsManifest"][0]["weights"]:
            stored = np.dtype(weight.get("quantization", weight)["dtype"])
            values = np.frombuffer(raw, stored, math.prod(weight["shape"]), start).astype(weight["dtype"])
            self.constants[weight["name"]] = torch.from_numpy(values.reshape(weight["shape"]))
            start += math.prod(weight["shape"]) * stored.itemsize
        assert start == len(raw)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, least: float) -> list[dict]:
        """Peaks of at least this score among their neighbours. image: uint8 (SIDE, SIDE, 3)."""
        keypoints, extents = self._run(torch.from_numpy(image)[None].float())
        scores, extents = keypoints[0].permute(2, 0, 1), extents[0].numpy()
        peaks = (scores == max_pool2d(scores, 3, stride=1, padding=1)) & (scores >= least)
        found = []
        for label, y, x in peaks.nonzero().tolist():
            middle = np.array([x, y, x, y]) * STRIDE
            box = (middle + extents[y, x] * [-1, -1, 1, 1]).tolist()
            found.append({"label": CLASSES[label], "box": box, "score": float(scores[label, y, x])})
        return found

    def _run(self, image: torch.Tensor) -> list[torch.Tensor]:
        values = {"tower_0/images": image} | self.constants
        waiting = list(OUTPUTS)
        while waiting:  # not by recursion: the graph is deep
            name = waiting[-1]
            missing = [one for one in self.nodes[name].get("input", ()) if one not in values]
            if not missing and name not in values:
                values[name] = compute(self.nodes[name], [values[one] for one in self.nodes[name]["input"]])
            if name in values:
                waiting.pop()
            waiting += missing
        return [values[name] for name in OUTPUTS]


def compute(node: dict, given: list[torch.Tensor]) -> torch.Tensor:
    """One of the graph's operations."""
    operation, first = node["op"], given[0]
    if "conv2d" in operation.lower():
        return convolution(node, *given)
    if operation == "ConcatV2":
        return torch.cat(given[:-1], dim=int(given[-1]))
    return {
        "Add": lambda: first + given[1],
        "Mul": lambda: first * given[1],
        "Identity": lambda: first,
        "Mean": lambda: first.mean(given[1].tolist(), keepdim=True),
        "Relu": lambda: first.relu(),
        "Relu6": lambda: first.clamp(0, 6),
        "ResizeBilinear": lambda: enlarged(enlarged(first, 1, int(given[1][0])), 2, int(given[1][1])),
        "Sigmoid": lambda: first.sigmoid(),
    }[operation]()


def convolution(node: dict, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
    """weight: (height, width, in, out); of a depthwise one `out` is a factor."""
    stride = [int(step) for step in node["attr"]["strides"]["list"]["i"][1:3]]
    x, groups = x.permute(0, 3, 1, 2), 1
    if "depthwise" in node["op"].lower():
        groups = x.shape[1]
        weight = weight.flatten(2).unsqueeze(2)
    if base64.b64decode(node["attr"]["padding"]["s"]) == b"SAME":
        for axis in (0, 1):  # the more of it at the end
            size, step, kernel = x.shape[2 + axis], stride[axis], weight.shape[axis]
            missing = max((math.ceil(size / step) - 1) * step + kernel - size, 0)
            sides = (missing // 2, missing - missing // 2)
            x = pad(x, (0, 0, *sides) if axis == 0 else sides)
    y = conv2d(x, weight.permute(3, 2, 0, 1), bias, stride, groups=groups).permute(0, 2, 3, 1)
    for after in node["attr"].get("fused_ops", {}).get("list", {}).get("s", ()):
        name = base64.b64decode(after).decode()
        y = {"BiasAdd": lambda y=y: y, "Relu": y.relu, "Relu6": lambda y=y: y.clamp(0, 6)}[name]()
    return y


def enlarged(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Bilinear along an axis; the first pixels lie on each other, as TensorFlow has it by default."""
    at = torch.arange(size) * (x.shape[axis] / size)
    before = at.floor().long()
    after = (before + 1).clamp(max=x.shape[axis] - 1)
    share = (at - before).view([-1 if i == axis else 1 for i in range(x.ndim)])
    return x.index_select(axis, before).lerp(x.index_select(axis, after), share)
