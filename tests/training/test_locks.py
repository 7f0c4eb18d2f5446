"""Run directories where the file system or the platform has no flock."""

import errno
import os
import subprocess
import sys

import pytest
from test_run import train


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_logs_a_warning(tmp_path, monkeypatch, caplog, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    train(tmp_path, steps=1)
    [warning] = [record.getMessage() for record in caplog.records if "lock" in record.getMessage()]
    assert f"{tmp_path / 'lock'}: exclusive use is not guaranteed" in warning and os.strerror(code) in warning


WINDOWS = """
import sys, types
sys.modules |= dict.fromkeys(["fcntl", "resource", "torch"])  # importing these fails; tensorboardX tries torch
import tensorboardX
from absl import logging
from test_run import hg, train

logging.set_verbosity(logging.WARNING)
train("without", steps=2)

def locking(descriptor, mode, n_bytes):
    held.append((mode, n_bytes))
    if len(held) > 1:
        raise PermissionError(13, "Permission denied")

held, sys.platform = [], "win32"
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
hg.Run("locked").claim()
assert held == [(2, 1)]
hg.Run("locked").release()
try:
    hg.Run("locked").claim()
except hg.UsageError as error:
    print(error)
"""


@pytest.mark.launchers
def test_a_platform_without_fcntl_and_resource_trains_and_locks_by_msvcrt(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WINDOWS]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert result.stdout.startswith("locked: another process trains here"), result.stderr
    assert "without/lock: exclusive use is not guaranteed" in result.stderr and "locked/lock" not in result.stderr
