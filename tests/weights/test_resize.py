"""Three input scales under each convention of resizing, against an independent network in PyTorch.

The files are written in the layouts of two PyTorch ports, one for each convention, converted and loaded: a wrong
preprocessing, a wrong stride, a lost head or the other resize each make the comparison fail.
"""

import jax
import numpy as np
import pytest

from deeplab_jax.configs import base
from deeplab_jax.inference.views import network_scores
from deeplab_jax.models import create_model, resnet
from deeplab_jax.weights import conversion, files, initial
from tests.weights import writers

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from tests.weights import reference_torch as reference  # noqa: E402

torch.set_num_threads(1)  # idle OpenMP threads spin

STAGES, WIDTHS, STEM = (1, 1, 3, 1), (8, 12, 16, 24), 4
SCALES = (1.0, 0.75, 0.5)
LAYOUTS = {"corners": writers.scale_name, "half_pixel": writers.deeplab_pytorch_name}


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(1)
    coarse = rng.uniform(0, 255, (1, 7, 8, 3)).repeat(16, 1).repeat(16, 2)
    return np.clip(coarse[:, :81, :97] + 30 * rng.standard_normal((1, 81, 97, 3)), 0, 255).round().astype(np.uint8)


@pytest.fixture
def narrow(monkeypatch):
    """ResNet-101's tables, few blocks and channels: in both networks."""
    monkeypatch.setattr(resnet, "BOTTLENECKS", {"resnet101": STAGES})
    monkeypatch.setattr(resnet, "BOTTLENECK_WIDTHS", WIDTHS)
    monkeypatch.setattr(resnet, "STEM_WIDTH", STEM)
    monkeypatch.setattr(reference, "RESNET_STAGES", {101: STAGES})
    return reference.random_resnet(classes=5, stem=STEM, widths=WIDTHS)


@pytest.mark.parametrize("resize", ["corners", "half_pixel"])
def test_three_scales_equal_pytorchs_under_the_convention_of_the_file(tmp_path, narrow, image, resize):
    w, path = narrow, tmp_path / "port.pth"
    torch.save(reference.tensors(writers.state_dict(w, LAYOUTS[resize])), path)
    model = base.get_config().model
    model.scales = SCALES
    out = tmp_path / "port.safetensors"
    conversion.convert(files.read(path), model, out)
    wanted = {"preprocessing": "caffe_bgr", "stride_on": "1x1", "resize": resize}
    assert initial.recorded_settings(out) == wanted
    model.update(wanted)
    network = create_model(model, 5)
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)
    variables, report = initial.load_initial(out, model, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))
    assert not report.missing and not report.left_out
    scores, details = jax.jit(network.apply)(variables, image)

    weights = reference.tensors(w)
    twins = {
        r: reference.three_scales(reference.caffe_input(image), lambda x: reference.resnet(x, weights)[0], r)
        for r in LAYOUTS
    }
    theirs = {r: fused.permute(0, 2, 3, 1).numpy() for r, (fused, _) in twins.items()}
    span = np.ptp(theirs[resize])
    assert np.abs(scores - theirs[resize]).max() < 1e-4 * span
    other = theirs["corners" if resize == "half_pixel" else "half_pixel"]
    assert np.abs(scores - other).max() > 0.02 * span
    sizes = {"corners": [(11, 13), (11, 13), (6, 7)], "half_pixel": [(11, 13), (8, 10), (6, 7)]}[resize]
    assert [m.shape[1:3] for m in details["scales"]] == sizes


class Pooled:
    """Replaces a network: means of 8 x 8 blocks around every eighth pixel."""

    def apply(self, variables, images, train, valid):
        padded = jax.numpy.pad(images, ((0, 0), (4, 3), (4, 3), (0, 0)), mode="edge")
        ones = (1, 8, 8, 1)
        return jax.lax.reduce_window(padded, 0.0, jax.lax.add, ones, ones, "VALID") / 640, {}


def pooled(x):
    padded = torch.nn.functional.pad(x, (4, 3, 4, 3), mode="replicate")
    return torch.nn.functional.avg_pool2d(padded, 8) * 0.1


@pytest.mark.parametrize("resize", ["corners", "half_pixel"])
def test_test_time_scales_are_resized_by_the_networks_convention(image, resize):
    log_probs = network_scores(
        Pooled(), {}, image, np.array([image.shape[1:3]], np.int32), scales=(1.0, 0.5), mirror=False, resize=resize
    )[0]
    x = torch.from_numpy(image.astype(np.float32)).permute(0, 3, 1, 2)
    found = {}
    for how in ("corners", "half_pixel"):

        def bilinear(x, size, how=how):
            return torch.nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=how == "corners")

        views = [torch.softmax(bilinear(pooled(bilinear(x, s)), (81, 97)), 1) for s in ((81, 97), (41, 49))]
        found[how] = (sum(views) / 2).permute(0, 2, 3, 1).numpy()[0]
    np.testing.assert_allclose(np.exp(log_probs), found[resize], atol=1e-4)
    other = found["corners" if resize == "half_pixel" else "half_pixel"]
    assert np.abs(np.exp(log_probs) - other).max() > 0.02
