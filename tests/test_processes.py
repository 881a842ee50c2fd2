"""Several processes, each with a device of its own, do what one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np


def run(count: int, out: Path) -> dict[str, np.ndarray]:
    """What so many processes found, that of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, str(here / "one_process.py"), str(i), str(count), str(port), str(out)],
            env={**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(said)
    return dict(np.load(out))


def test_two_processes_sample_and_train_as_one(tmp_path):
    """Weights parted over them: the same samples, advantages and weights to rounding."""
    one, two = run(1, tmp_path / "one.npz"), run(2, tmp_path / "two.npz")
    assert one.keys() == two.keys()
    for name, x in one.items():
        if name.startswith("tokens"):
            np.testing.assert_array_equal(two[name], x, err_msg=name)
        else:
            np.testing.assert_allclose(two[name], x, rtol=1e-3, atol=1e-5, err_msg=name)
