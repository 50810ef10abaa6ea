"""Compiled programs are kept in a bounded folder; flags know of the CRF without importing it."""

import os
import time
from pathlib import Path

from deeplab_jax import crf_flags, crf_search, startup


def test_the_longest_unused_programs_go_first(tmp_path):
    now = time.time()
    for age, name in enumerate(("newest", "middle", "oldest")):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (now - 1000 * age, now - 5000))  # by when they were read, not written
    startup.bound_folder(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "newest"]
    startup.bound_folder(tmp_path, 250)
    assert len(list(tmp_path.iterdir())) == 2
    startup.bound_folder(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_another_process_removed_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, **options: (unlink(self), unlink(self, missing_ok=True)))
    startup.bound_folder(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_where_programs_are_kept(monkeypatch, tmp_path):
    for value, folder in ((str(tmp_path), tmp_path), ("off", None)):
        monkeypatch.setenv("DEEPLAB_COMPILATION_CACHE", value)
        assert startup.compilation_cache() == folder
    monkeypatch.delenv("DEEPLAB_COMPILATION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert startup.compilation_cache().name == "compiled"


def test_what_the_flags_say_of_the_crf_is_so():
    from deeplab_jax.crf import PRESETS, params
    from deeplab_jax.search import grid

    assert crf_flags.FIELDS == params.FIELDS
    assert crf_flags.NORMALIZATIONS == params.NORMALIZATIONS
    assert tuple(PRESETS) == crf_flags.PRESETS
    assert crf_search.OBJECTIVES == grid.OBJECTIVES
    assert tuple(grid.GRIDS) == crf_search.GRIDS
