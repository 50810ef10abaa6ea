import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.config import load_config
from deeplab_jax.models import create_model, initial, is_classifier, is_frozen, output_size, preprocess
from deeplab_jax.models.deeplab import TORCH_MEAN_RGB, TORCH_STD_RGB
from deeplab_jax.models.layers import resize_bilinear
from tests.models import thin


def small(**fields):
    config = load_config("camvid", ("model.output_stride=8",))
    config.model.update(
        widths=(4, 4, 6, 6), blocks=(1, 1, 1, 1), head_width=4, head_rates=(2, 4), fine_branch=0,
        preprocessing="caffe_bgr",
    )  # fmt: skip
    config.model.update(fields)
    return config


def photographs(batch=1, size=(65, 81)):
    return jax.random.uniform(jax.random.key(7), (batch, *size, 3)) * 255


def test_preprocessing():
    red = jnp.asarray([255, 0, 0], jnp.uint8)[None, None, None]
    np.testing.assert_allclose(preprocess(red, "caffe_bgr")[0, 0, 0], [-104.008, -116.669, 132.325], rtol=1e-5)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    np.testing.assert_allclose(preprocess(red, "torch_rgb")[0, 0, 0], expected, rtol=1e-5)
    assert (preprocess(red, "caffe_bgr", jnp.zeros((1, 1, 1), bool)) == 0).all()


def test_own_preprocessing_takes_each_images_own_light():
    image = photographs(size=(9, 7))
    inside = jnp.ones((1, 9, 7), bool).at[:, 6:].set(False)
    got = preprocess(image, "own_rgb", inside)
    seen = np.asarray(image, np.float64)[0, :6]
    np.testing.assert_allclose(got[0, :6], (seen - seen.mean()) / seen.std(), atol=1e-5)
    assert (got[0, 6:] == 0).all()
    darker = preprocess(image * 0.3 + 20, "own_rgb", inside)
    np.testing.assert_allclose(darker, got, atol=1e-5)
    pair = preprocess(jnp.concatenate([image, image * 0.5]), "own_rgb", jnp.concatenate([inside, inside]))
    np.testing.assert_allclose(pair[1], pair[0], atol=1e-5)  # not the batch's
    assert (preprocess(jnp.full((1, 4, 4, 3), 80), "own_rgb") == 0).all()
    spot = jnp.zeros((1, 20, 20, 3)).at[0, 0, 0].set(255)  # 20 deviations from the mean, which training never shows
    assert float(preprocess(spot, "own_rgb").max()) == pytest.approx((255 - 115) / 58)


@pytest.mark.parametrize("freeze", [False, True])
def test_training_takes_the_light_as_even(freeze):
    config = small()
    config.model.update(preprocessing="own_rgb", freeze_network=freeze, batch_norm="trained")
    model, x = create_model(config.model, 3), photographs() * 0.2
    variables = thin.variables(model)
    config.model.preprocessing = "torch_rgb"
    other = create_model(config.model, 3)
    scaled = ((x - 115) / 58 * jnp.asarray(TORCH_STD_RGB) + jnp.asarray(TORCH_MEAN_RGB)) * 255
    run = lambda m, images: m.apply(  # noqa: E731
        variables, images, train=True, dropout_keys=jax.random.split(jax.random.key(0), 1), mutable=["batch_stats"]
    )[0][0]
    thin.assert_close(run(model, x), run(other, scaled))


def test_padding_is_the_mean_color():
    config = small()
    model, x = create_model(config.model, 3), photographs()
    variables = thin.variables(model)
    valid = jnp.ones(x.shape[:3], bool).at[:, 40:].set(False)
    apply = jax.jit(model.apply)
    mean = jnp.asarray([122.675, 116.669, 104.008])
    painted = apply(variables, x.at[:, 40:].set(mean), valid=jnp.ones_like(valid))[0]
    thin.assert_close(apply(variables, x, valid=valid)[0], painted)


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(
    "fields",
    [
        {"backbone": "resnet_small"},
        {"backbone": "resnet_small", "fine_branch": 4},
        {"backbone": "resnet50", "head_width": 0},
        {"backbone": "vgg16"},
        {"backbone": "vgg16", "base_pools": True, "head": "fc", "head_rates": (4,), "head_kernel": 4, "msc": True},
    ],
)
def test_output_size_is_the_score_maps(monkeypatch, fields, stride):
    thin.narrow(monkeypatch)
    config = small(output_stride=stride, **fields)
    model = create_model(config.model, 3)
    for size in ((97, 129), (100, 122)):
        x = jnp.zeros((1, *size, 3))
        logits, _ = jax.eval_shape(lambda key, x=x: model.init_with_output(key, x)[0], jax.random.key(0))
        assert logits.shape == (1, *output_size(config.model, size), 3)


@pytest.mark.parametrize(
    ("name", "size", "score"),
    [("voc_vgg16", 306, 39), ("voc_vgg16_7x7", 306, 39), ("voc_vgg16_largefov", 321, 41), ("voc_aspp_l", 321, 41)],
)
def test_published_score_sizes(name, size, score):
    assert output_size(load_config(name).model, (size, size)) == (score, score)


def test_head_rates_follow_the_output_stride():
    config = small(head_rates=(6, 12, 18, 24), output_stride=16)
    assert create_model(config.model, 3).architecture.rates == (3, 6, 9, 12)
    config.model.output_stride = 32
    with pytest.raises(ValueError, match=r"head_rates=\(6, 12, 18, 24\).* at 32 .* give multiples of 4"):
        create_model(config.model, 3)
    config.model.head_rates = (12, 24)
    assert create_model(config.model, 3).architecture.rates == (3, 6)
    config.model.update(head_rates=(3,), output_stride=16)
    with pytest.raises(ValueError, match="give multiples of 2"):
        create_model(config.model, 3)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"backbone": "resnet102"}, "backbone"),
        ({"head": "fc"}, "VGG-16"),
        ({"msc": True}, "msc"),
        ({"widths": (4, 4)}, "widths"),
        ({"scales": (0.5, 1.0)}, "scales"),
        ({"output_stride": 4}, "output_stride"),
        ({"head": "largefov"}, "head_rates"),
        (
            {"backbone": "resnet50", "head": "aspp", "head_rates": ()},
            r"head_rates=\(\): head 'aspp' needs at least one rate",
        ),
        ({"backbone": "vgg16", "head_kernel": 7}, "head_kernel=7: vgg16 with head 'aspp' has 3x3 kernels"),
        ({"head_kernel": 7}, "head_kernel=7: resnet_small with head 'aspp' has 3x3 kernels"),
    ],
)
def test_impossible_networks_are_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        create_model(small(**fields).model, 3)


def test_input_scales_share_weights_and_fuse_by_max():
    config = small(scales=(1.0, 0.75, 0.5), batch_norm="frozen")
    x = photographs(size=(65, 97))
    model = create_model(config.model, 3)
    variables = thin.variables(model)
    logits, out = jax.jit(model.apply)(variables, x)
    assert [s.shape[1:3] for s in out["scales"]] == [(9, 13), (9, 13), (5, 7)]
    config.model.scales = (1.0,)
    single = jax.jit(create_model(config.model, 3).apply)
    scores, nothing = single(variables, x)
    assert nothing == {}
    thin.assert_close(out["scales"][0], scores)
    thin.assert_close(out["scales"][2], single(variables, x[:, ::2, ::2])[0])
    halved = resize_bilinear(out["scales"][2], (9, 13))
    thin.assert_close(logits, jnp.maximum(jnp.maximum(*out["scales"][:2]), halved))


def test_bfloat16():
    x = photographs()
    model = create_model(small().model, 3)
    variables = thin.variables(model)

    def loss(params, rest, model):
        (logits, _), _ = model.apply({"params": params, **rest}, x, train=True, mutable=["batch_stats"])
        assert logits.dtype == jnp.float32
        return jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    rest = {"batch_stats": variables["batch_stats"]}  # passed in: constants would be folded
    grad = jax.jit(jax.grad(loss), static_argnums=2)
    plain = grad(variables["params"], rest, model)
    half = grad(variables["params"], rest, create_model(small(dtype="bfloat16").model, 3))
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(half))
    norms = [float(sum(jnp.sum(g**2) for g in jax.tree.leaves(t))) for t in (plain, half)]
    assert norms[1] == pytest.approx(norms[0], rel=0.3)


def test_parameter_groups(monkeypatch):
    thin.narrow(monkeypatch)

    def paths(name):
        model = create_model(load_config(name).model, 3)
        leaves = jax.tree_util.tree_flatten_with_path(thin.shapes(model)["params"])[0]
        return [tuple(key.key for key in path) for path, _ in leaves]

    frozen = load_config("voc_aspp_l").model
    names = paths("voc_aspp_l")
    assert {p[1] for p in names if is_classifier(p)} == {"fc1_c0", "fc1_c1", "fc1_c2", "fc1_c3"}
    assert {p for p in names if is_frozen(p, frozen)} == {p for p in names if p[1].startswith("bn")}
    assert is_frozen(("params", "backbone", "bn_conv1", "scale"), frozen)

    msc = load_config("voc_vgg16_msc_largefov").model
    names = paths("voc_vgg16_msc_largefov")
    trained = {p[1:-1] for p in names if not is_frozen(p, msc)}
    branches = {(f"{s}_{i}",) for s in ("data", "pool1", "pool2", "pool3", "pool4") for i in (1, 2)}
    assert trained == {("msc", *b) for b in branches} | {("msc", "fc8_msc")}
    assert {p[1:-1] for p in names if is_classifier(p)} == {("fc8",), ("msc", "fc8_msc")}


def test_only_the_side_branches_learn_under_a_frozen_trunk(monkeypatch):
    thin.narrow(monkeypatch)
    config = load_config("voc_vgg16_msc_largefov")
    config.model.head_width = 4
    model, x = create_model(config.model, 3), jnp.full((1, 33, 33, 3), 250.0)  # positive throughout: no dead ReLU
    variables = thin.variables(model, positive=True)
    keys = jax.random.split(jax.random.key(1), 1)

    def loss(variables):
        return jnp.sum(model.apply(variables, x, train=True, dropout_keys=keys)[0])

    grads = jax.jit(jax.grad(loss))(variables)["params"]
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
        names = tuple(key.key for key in path)
        assert bool((grad != 0).any()) != is_frozen(names, config.model), names


def test_crf_inside_sees_the_photograph():
    config = small(batch_norm="frozen", preprocessing="torch_rgb")
    config.crf.update(train="end_to_end", train_iterations=2, stride=8, bilateral="exact", preset="deeplab_v1")
    x = photographs(2)
    model = create_model(config.model, 3, config.crf)
    variables = initial.draw(model, initial.plan(model), seed=0)
    assert set(variables["params"]) == {"backbone", "head", "crf"}
    logits, out = jax.jit(model.apply)(variables, x)
    assert out["marginals"].shape == (2, 9, 11, 3)
    np.testing.assert_allclose(out["marginals"].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(out["log_marginals"]), out["marginals"], atol=1e-5)

    from deeplab_jax.crf import mean_field, setting_from_config

    setting = setting_from_config(config.crf)
    unary, sampled = -jax.nn.log_softmax(logits), x[:, ::8, ::8]
    options = {"iterations": 2, "bilateral": "exact", "normalization": setting.normalization}
    expected = mean_field(unary, sampled, setting.params.at_stride(8), **options)
    np.testing.assert_allclose(out["marginals"], expected, atol=1e-5)
    assert create_model(config.model, 3, load_config("voc_aspp_l").crf).crf is None


def test_a_frozen_trunk_keeps_its_statistics():
    config = small(batch_norm="trained", freeze_trunk=True)
    model = create_model(config.model, 3)
    variables = thin.variables(model)
    _, changed = model.apply(variables, photographs(2), train=True, mutable=["batch_stats"])
    for name, moved in (("backbone", False), ("head", True)):
        pairs = [jax.tree.leaves(tree["batch_stats"][name]) for tree in (variables, changed)]
        assert any((a != b).any() for a, b in zip(*pairs, strict=True)) == moved, name
