"""What commands set before JAX starts."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from deeplab_jax import cli

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
TWO = "--xla_force_host_platform_device_count=2"
CODE = """
import os
from deeplab_jax import cli
cli.set_xla_defaults()
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
    cli.set_xla_defaults()
    assert os.environ["XLA_FLAGS"] == expected
