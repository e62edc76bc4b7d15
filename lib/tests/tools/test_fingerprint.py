"""The fingerprint of a machine's arithmetic: repeats, leaves random numbers alone, tells another CPU."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fingerprint


def test_fingerprint_repeats_and_leaves_random_numbers_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = fingerprint.arithmetic_fingerprint()
    assert torch.equal(torch.rand(3), expected)
    assert fingerprint.arithmetic_fingerprint() == first


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="one kernel only elsewhere")
def test_fingerprint_sees_another_cpu():
    """Two processors, wherever this runs: under ATEN_CPU_CAPABILITY=default, too."""
    code = "from fingerprint import arithmetic_fingerprint as f; print(f())"
    env, found = dict(os.environ, PYTHONPATH=str(Path(fingerprint.__file__).parent)), set()
    for capability in ("default", "avx2"):
        env["ATEN_CPU_CAPABILITY"] = capability
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        found.add(done.stdout.strip())
    assert len(found) == 2
