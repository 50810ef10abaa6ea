"""The files that a command may read and write, and how names are shown."""

import os
import socket

import pytest

from deeplab_jax.data.builders import base
from deeplab_jax.data.class_files import read_classes
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import listing
from deeplab_jax.imaging.files import read_label, read_photograph
from tests.command_line import call


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    (tmp_path / "in" / "zero.png").symlink_to("/dev/zero")
    return tmp_path / "in"


def test_what_is_not_a_file_is_left_out_in_a_folder_and_refused_by_name(folder, capsys):
    (folder / "lost.png").symlink_to("nowhere")
    for _ in range(2):  # named once
        assert [item.path.name for item in listing.find_inputs([folder])] == ["a.png", "b.png", "c.png"]
    assert sorted(capsys.readouterr().err.splitlines()) == [
        f"warning: {folder}/lost.png: no such file or folder; left out",
        f"warning: {folder}/pipe.png: is a pipe, not a file; left out",
        f"warning: {folder}/zero.png: is a device, not a file; left out",
    ]
    with pytest.raises(UserError, match=r"pipe\.png: is a pipe, not a file"):
        listing.find_inputs([folder / "pipe.png"])
    with pytest.raises(UserError, match=r"zero\.png: is a device, not a file"):
        listing.check_file(folder / "zero.png")


def test_what_cannot_be_read_is_reported_and_the_rest_is_listed(folder):
    said = []
    found = listing.find_inputs([folder / "gone.png", folder / "a.png"], complain=said.append)
    assert [item.path.name for item in found] == ["a.png"]
    assert said == [f"{folder}/gone.png: no such file or folder"]
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        listing.find_inputs([folder / "gone.png", folder / "a.png"])


def test_a_folder_that_cannot_be_read_is_said(folder, monkeypatch):
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    said = []
    found = listing.find_inputs([folder], complain=said.append)
    assert [item.path.name for item in found] == ["a.png", "b.png"]
    assert len(said) == 1 and "sub: cannot be read (Permission denied)" in said[0]
    with pytest.raises(UserError, match="sub: cannot be read"):
        listing.find_inputs([folder])


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_what_has_no_end_is_not_read(tmp_path, kind):
    """Neither as a photograph, a list of classes or names, nor as anything else that is named."""
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(path))
    for read in (read_photograph, read_label, read_classes, base.read_names, base.read_bytes):
        with pytest.raises(UserError, match=r"a\.png: .*it is a pipe, a device or a socket, not a file"):
            read(path)
    done = call("convert_labels", path, f"--out={tmp_path}/out")
    assert done.returncode == 1
    assert done.stderr.endswith("a.png: is a pipe, a device or a socket; name a file or folder of labels\n")


def test_no_output_replaces_an_input_whatever_it_is_called(folder):
    (folder / "link.png").symlink_to(folder / "a.png")
    os.link(folder / "a.png", folder / "hard.png")
    for output in (folder / "a.png", folder / ".." / "in" / "a.png", folder / "link.png", folder / "hard.png"):
        with pytest.raises(UserError, match="would overwrite the input"):
            listing.check_outputs([folder / "new.png", output], [folder / "b.png", folder / "a.png"])
    listing.check_outputs([folder / "new.png", folder / "b.png"], [folder / "a.png"])
    with pytest.raises(UserError, match="would overwrite"):  # of files that are not there yet, too
        listing.check_outputs([folder / "sub" / ".." / "new.png"], [folder / "new.png"])
