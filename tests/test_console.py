"""What commands print: safe for terminals."""

import os

from deeplab_jax.console import shown
from tests.command_line import call


def test_names_are_shown_without_what_terminals_obey():
    assert shown("Straße 写真.png") == "Straße 写真.png"
    assert shown("a\x1b[2Jb") == "a\\x1b[2Jb"
    assert shown("\u202egpj.exe") == "\\u202egpj.exe"
    assert shown(os.fsdecode(b"a\xff.png")) == "a\\udcff.png"


def test_an_error_shows_an_arguments_control_characters():
    done = call("describe", "--config=a\x1b[2Jb")
    assert done.returncode == 1 and "\x1b" not in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "a\\x1b[2Jb" in done.stderr
