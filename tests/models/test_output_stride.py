"""The paper's claim: the atrous network computes the strided one's result at more positions."""

import jax
import pytest

from deeplab_jax.models import resnet, vgg
from deeplab_jax.models.architecture import Architecture
from tests.models import thin


def features(trunk, architecture, x, variables=None):
    module = trunk(architecture)
    variables = variables or thin.variables(module)
    return jax.jit(module.apply)(variables, x), variables


@pytest.mark.parametrize(
    ("backbone", "stride_on", "size"),
    [
        ("resnet101", "1x1", (66, 92)),
        pytest.param("resnet101", "1x1", (65, 97), marks=pytest.mark.long),
        pytest.param("resnet101", "3x3", (65, 97), marks=pytest.mark.long),
        ("resnet101", "3x3", (66, 92)),
        ("resnet_small", "3x3", (66, 97)),
    ],
)
def test_resnet_sampled_equals_strided(monkeypatch, backbone, stride_on, size):
    thin.narrow(monkeypatch)
    x = jax.random.normal(jax.random.key(1), (1, *size, 3))
    fields = {"backbone": backbone, "stride_on": stride_on, "head": "plain", "widths": (4, 4, 6, 6)}
    maps, variables = {}, None
    for stride in (8, 16, 32):
        maps[stride], variables = features(resnet.ResNet, Architecture(**fields, output_stride=stride), x, variables)
    assert (maps[32]["last"] > 0).mean() > 0.1
    thin.assert_close(maps[8]["last"][:, ::4, ::4], maps[32]["last"])
    thin.assert_close(maps[16]["last"][:, ::2, ::2], maps[32]["last"])


@pytest.mark.parametrize("size", [(65, 97), (66, 92)])
@pytest.mark.parametrize("base_pools", [False, True])
def test_vgg_sampled_equals_strided(monkeypatch, base_pools, size):
    thin.narrow(monkeypatch)
    x = jax.random.normal(jax.random.key(1), (1, *size, 3))
    fields = {"backbone": "vgg16", "head": "plain", "base_pools": base_pools}
    dense, variables = features(vgg.VGG16, Architecture(**fields, output_stride=8), x)
    strided, _ = features(vgg.VGG16, Architecture(**fields, output_stride=16), x, variables)
    assert (strided["conv5_3"] > 0).any()
    thin.assert_close(dense["conv5_3"][:, ::2, ::2], strided["conv5_3"])
