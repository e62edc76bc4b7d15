"""The fingerprint of a machine's arithmetic: repeats, leaves random numbers alone, tells another CPU."""

import os
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


@pytest.mark.skipif(sys.platform != "linux", reason="other builds of torch have one kernel only")
def test_fingerprint_sees_another_cpu():
    code = "from fingerprint import arithmetic_fingerprint as f; print(f())"
    env = dict(os.environ, ATEN_CPU_CAPABILITY="default", PYTHONPATH=str(Path(fingerprint.__file__).parent))
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip() != fingerprint.arithmetic_fingerprint()
