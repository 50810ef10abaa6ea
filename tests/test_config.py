"""Finding configs and changing their fields."""

import pytest

from deeplab_jax.config import fields, find_config, load_config
from deeplab_jax.errors import UserError
from tests.command_line import call


@pytest.mark.parametrize("name", ["shapes", "shapes.py", "configs/shapes.py"])
def test_shipped_configs_are_found_by_name(name):
    assert find_config(name).name == "shapes.py"
    assert load_config(name).name == "shapes"


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("batch_size=3", "batch_size", 3),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("data.crop=65,97", "data.crop", (65, 97)),
        ("data.crop=(65, 97)", "data.crop", (65, 97)),
        ("loss.class_weights=sqrt", "loss.class_weights", ("sqrt",)),
        ("data.stages=", "data.stages", ()),
        ("model.remat=true", "model.remat", True),
        ("data.dir=a=b", "data.dir", "a=b"),
        ("crf.bilateral_weight=2", "crf.bilateral_weight", 2.0),
        ("crf.bilateral_weight=1,4,1", "crf.bilateral_weight", (1.0, 4.0, 1.0)),
        ("crf.gaussian_weight=(0, 2.5)", "crf.gaussian_weight", (0.0, 2.5)),
    ],
)
def test_overrides_take_the_fields_type(override, field, value):
    assert dict(fields(load_config("base", [override])))[field] == value


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("crf.iteration=3", "did you mean 'crf.iterations'"),
        ("crf=3", "is a group of fields"),
        ("batch_size=many", "needs a value of type int, such as 10"),
        ("batch_size=2.5", "needs a value of type int"),
        ("model.remat=maybe", "needs true or false"),
        ("crf.bilateral_weight=1,x", "needs a number, or one for each class, such as 4.0 or 1.0,1.0,4.0"),
        ("crf.bilateral_xy_std=1,2", "needs a value of type float"),
        ("num_steps=1e400", "needs a value of type int"),
        (f"optimizer.learning_rate={10**400}", "needs a value of type float"),
        ("batch_size={[]:1}", "needs a value of type int"),
        (f"seed={'(' * 5000}", "needs a value of type int"),
        ("seed", "needs a value"),
    ],
)
def test_mistakes_are_named(override, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config("base", [override])


def test_unknown_config_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'camvid'"):
        find_config("camvd")


def test_a_users_own_config_may_start_from_a_shipped_one(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from deeplab_jax.configs import camvid\n\n\ndef get_config():\n    config = camvid.get_config()\n"
        "    config.batch_size = 2\n    return config\n"
    )
    assert load_config(str(file)).batch_size == 2
    file.write_text("from deeplab_jax.configs import base\ndef get_config(:\n")
    with pytest.raises(UserError, match="line 2 is not Python"):
        load_config(str(file))
    file.write_text(
        "from deeplab_jax.configs import base\n\n\ndef get_config():\n    c = base.get_config()\n    c.modl.x = 1\n"
    )
    with pytest.raises(UserError, match="modl"):
        load_config(str(file))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("c.optimizer.learning_rat = 0.5", "no field 'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'"),
        ("c.modle = 3", "the config has no field 'modle'; did you mean 'mod"),
        ("del c.eval.mirror", "the config lacks the field 'eval.mirror'; begin with base.get_config"),
        ("c.data.crop = 97", r"line 6: .*<class 'tuple'>"),
        ("c.batch_size = '4'", r"line 6: .*<class 'int'>"),
        ("c = 1 / 0", "line 6: division by zero"),
        ("c = 3", r"get_config\(\) returns int; it must return the config"),
    ],
)
def test_mistakes_in_a_users_own_config_are_named(tmp_path, line, sentence):
    file = tmp_path / "mine.py"
    file.write_text(
        "from deeplab_jax.configs import base\n\n\ndef get_config():\n    c = base.get_config()\n"
        f"    {line}\n    return c\n"
    )
    with pytest.raises(UserError, match=rf"^{file}: .*{sentence}"):
        load_config(str(file))


def test_a_file_sets_one_weight_for_each_class_as_flags_do(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from deeplab_jax.configs import base\n\ndef get_config():\n    config = base.get_config()\n"
        "    config.crf.update(bilateral_weight=(1.0, 4.0), gaussian_weight=2.0)\n    return config\n"
    )
    config = load_config(str(file), ["crf.gaussian_weight=1,2"])
    assert (config.crf.bilateral_weight, config.crf.gaussian_weight) == ((1.0, 4.0), (1.0, 2.0))
    assert load_config("base").crf.bilateral_weight == 4.0


def test_a_value_of_another_type_is_named(tmp_path):
    """A config that begins with a copy of its own is not held to types until a command reads it."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\nfrom deeplab_jax.configs import base\n\n\ndef get_config():\n"
        "    return ConfigDict(base.get_config().to_dict() | {'batch_size': '4'})\n"
    )
    done = call("describe", f"--config={file}")
    assert (done.returncode, done.stderr) == (1, "error: 'config.batch_size' is '4', and should be like 10\n")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("describe", []),
        ("check_dataset", []),
        ("crf_search", ["--workdir=w"]),
        ("predict", ["--init_from=w.safetensors", "--out=out", "photograph.jpg"]),
        ("main", ["--mode=eval", "--workdir=w"]),
    ],
)
def test_every_command_refuses_what_none_can_use(tmp_path, monkeypatch, command, arguments):
    monkeypatch.chdir(tmp_path)
    done = call(command, "--config=shapes", "--config.optimizer.name=adam", *arguments)
    assert (done.returncode, done.stderr) == (1, "error: config.optimizer.name=adam: must be one of sgd, adamw\n")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
