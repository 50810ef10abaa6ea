"""Settings that commands make before JAX starts."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deeplab_jax import startup

ROOT = Path(__file__).parents[1]
FLAG = "--xla_cpu_experimental_ynn_fusion_type"
TWO = "--xla_force_host_platform_device_count=2"
CODE = """
import os
from deeplab_jax import startup
startup.set_xla_defaults()
import jax, jax.numpy as jnp
jnp.ones(2).sum().block_until_ready()
print(jax.device_count(), os.environ["XLA_FLAGS"])
"""


def test_jax_starts_with_the_defaults_and_the_users_flags():
    """A flag that XLA does not know would end the process."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": TWO, "DEEPLAB_XLA_DEFAULTS": ""}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["2", TWO, f"{FLAG}="], done.stderr


@pytest.mark.parametrize(
    ("environment", "jaxlib", "expected"),
    [
        ({}, "0.10.2", f"{FLAG}="),
        ({"XLA_FLAGS": TWO}, "0.11.0", f"{TWO} {FLAG}="),
        ({"XLA_FLAGS": f"{FLAG}=1"}, "0.10.2", f"{FLAG}=1"),
        ({"DEEPLAB_XLA_DEFAULTS": "off"}, "0.10.2", ""),
        ({}, "0.9.1", ""),
        ({}, "0.12.0", ""),
    ],
    ids=["alone", "joined", "the user's own", "off", "an older jaxlib", "a newer jaxlib"],
)
def test_when_defaults_are_set(monkeypatch, environment, jaxlib, expected):
    for name, value in ({"XLA_FLAGS": "", "DEEPLAB_XLA_DEFAULTS": "", "JAX_PLATFORMS": "cpu"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: jaxlib)
    startup.set_xla_defaults()
    assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize(
    ("plugins", "devices", "asked", "expected"),
    [
        (["xla_cuda12"], [], "", f"{FLAG}="),  # plugins without devices do not count
        (["libtpu", "xla_cuda12"], [], "", f"{FLAG}="),
        (["xla_cuda12"], ["nvidia0"], "", ""),
        (["xla_cuda12"], ["nvidia0"], "cpu", f"{FLAG}="),
        (["xla_cuda12"], [], "cuda,cpu", ""),
        (["libtpu"], ["accel0"], "", ""),
        (["libtpu"], ["nvidia0"], "", f"{FLAG}="),
        (["xla_rocm7"], ["kfd"], "", ""),
        (["another"], [], "", ""),  # its devices are unknown
    ],
)
def test_cpus_keep_their_flags_beside_plugins_without_devices(monkeypatch, tmp_path, plugins, devices, asked, expected):
    for name, value in {"XLA_FLAGS": "", "DEEPLAB_XLA_DEFAULTS": "", "JAX_PLATFORMS": asked}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "dev").mkdir()
    for name in devices:
        (tmp_path / "dev" / name).touch()
    has_devices = startup._has_devices
    monkeypatch.setattr(startup, "_has_devices", lambda plugin: has_devices(plugin, tmp_path))
    monkeypatch.setattr(startup, "_plugins", lambda: [p for p in plugins if p != "libtpu"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in plugins)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    startup.set_xla_defaults()
    assert os.environ["XLA_FLAGS"] == expected


COMMAND = """
import os, sys
from deeplab_jax import cli

def main(rest):
    print(os.getpid(), os.environ.get("GLIBC_TUNABLES", ""), sys.argv[1:])

if __name__ == "__main__":
    print("starts", flush=True)
    cli.run(main)
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
        ({"DEEPLAB_HUGE_PAGES": "off"}, ""),
    ],
    ids=["alone", "joined", "the user's own", "off"],
)
def test_a_command_asks_for_huge_pages_and_keeps_its_arguments(tmp_path, environment, expected):
    """Where Linux gives them on request only; elsewhere the process stays as it is."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    on_request = setting.is_file() and "[madvise]" in setting.read_text()
    before = environment.get("GLIBC_TUNABLES", "")
    if not on_request:
        expected = before
    (tmp_path / "command.py").write_text(COMMAND)
    env = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "DEEPLAB_HUGE_PAGES")} | environment
    started = subprocess.Popen(
        [sys.executable, "-W", "error", str(tmp_path / "command.py"), "a b", "c"],
        env=env | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, err = started.communicate(timeout=120)
    *starts, said = out.splitlines()
    assert started.returncode == 0, err
    assert starts == ["starts"] * (1 if expected == before else 2)
    assert said == f"{started.pid} {expected} ['a b', 'c']"
