"""Figures read from compiled programs; if the compilers are installed, bounds on programs for GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from deeplab_jax.errors import UserError
from experiments import compile_for, targets
from experiments.program_text import costs

ROOT = Path(__file__).parents[2]

# A loop of five steps whose trips only its condition shows, a fusion that slices, an all-reduce, a branch.
TEXT = """HloModule example

%product (a: bf16[8,16], b: bf16[16,4]) -> f32[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  ROOT %dot = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%rows (whole: f32[100,4], at: s32[]) -> f32[1,4] {
  %whole = f32[100,4]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,4]{1,0} dynamic-slice(%whole, %at, %zero), dynamic_slice_sizes={1,4}
}

%body (p: (s32[], f32[100,4])) -> (s32[], f32[100,4]) {
  %p = (s32[], f32[100,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %x = f32[100,4]{1,0} get-tuple-element(%p), index=1
  %row = f32[1,4]{1,0} fusion(%x, %n), kind=kLoop, calls=%rows
  %sorted = f32[1,4]{1,0} sort(%row), dimensions={1}, backend_config={"estimated_cycles":"10"}
  ROOT %out = (s32[], f32[100,4]{1,0}) tuple(%n, %x)
}

%condition (q: (s32[], f32[100,4])) -> pred[] {
  %q = (s32[], f32[100,4]{1,0}) parameter(0)
  %m = s32[] get-tuple-element(%q), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%m, %five), direction=LT
}

%cheap (c: f32[8,4]) -> f32[8,4] {
  ROOT %c = f32[8,4]{1,0} parameter(0)
}

%dear (d: f32[8,4]) -> f32[8,4] {
  %d = f32[8,4]{1,0} parameter(0)
  ROOT %copied = f32[8,4]{1,0} copy(%d)
}

ENTRY %main (a: bf16[8,16], b: bf16[16,4], x: f32[100,4], which: pred[]) -> f32[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  %x = f32[100,4]{1,0} parameter(2)
  %which = pred[] parameter(3)
  %y = f32[8,4]{1,0:S(1)} fusion(%a, %b), kind=kOutput, calls=%product
  %sum = f32[8,4]{1,0} all-reduce(%y), replica_groups={}, to_apply=%add
  %zero = s32[] constant(0)
  %start = (s32[], f32[100,4]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[100,4]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %end = f32[8,4]{1,0} conditional(%which, %sum, %sum), true_computation=%cheap, false_computation=%dear
}
"""


def test_costs_of_a_program_count_loops_by_their_trips():
    found = costs(TEXT)
    assert found["flops"] == found["flops_bfloat16"] == 2 * 8 * 4 * 16
    assert (found["loop_steps"], found["unknown_loops"], found["sorts"], found["cycles"]) == (5, 0, 5, 50)
    assert (found["collectives"], found["collective_bytes"]) == (1, 8 * 4 * 4)
    # The product, the sum, five times slice, sort and comparison, the copy of the dearer branch.
    assert found["kernels"] == 1 + 1 + 5 * 3 + 1
    product = 8 * 16 * 2 + 16 * 4 * 2  # its result lies in VMEM
    loop = 5 * ((16 + 4 + 16) + (16 + 16) + (4 + 4 + 1))
    assert found["bytes"] == product + 128 + loop + 256


def test_gradients_of_convolutions_by_cudnn_cost_what_the_convolution_does():
    """One of 3 x 3 from 8 to 16 channels over 10 x 12 positions, two images."""
    x, dy, kernel = "f32[2,10,12,8]{3,2,1,0}", "f32[2,10,12,16]{3,2,1,0}", "f32[16,3,3,8]{3,2,1,0}"

    def program(target, result, first, second):
        return f"""ENTRY %main (a: x, b: x) -> x {{
  %a = {first} parameter(0)
  %b = {second} parameter(1)
  ROOT %c = ({result}, u8[64]{{0}}) custom-call(%a, %b), window={{size=3x3 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{target}"
}}
"""  # noqa: E501

    forward = costs(program("Forward", dy, x, kernel))["flops"]
    assert forward == 2 * (2 * 10 * 12 * 16) * (3 * 3 * 8)
    assert costs(program("BackwardInput", x, dy, kernel))["flops"] == forward
    assert costs(program("BackwardFilter", kernel, x, dy))["flops"] == forward


def test_costs_of_what_jax_compiles_here():
    def steps(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=7)[0]

    found = costs(jax.jit(steps).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().as_text())
    assert (found["flops"], found["loop_steps"], found["unknown_loops"]) == (7 * 2 * 64**3, 7, 0)


def test_estimates_follow_the_chip():
    chip = targets.CHIPS["v5e"]
    counts = {"flops": 3e12, "flops_highest": 1e12, "flops_bfloat16": 1e12, "bytes": 819e6, "cycles": 3e6}
    found = compile_for.estimate(counts, chip)
    assert found["bytes_ms"] == pytest.approx(1.0)
    assert found["products_ms"] == found["estimate_ms"] == pytest.approx(8e12 / 197e12 * 1e3)
    assert found["cycles_ms"] == pytest.approx(2.0)


@pytest.mark.parametrize("target", ["v5e", "v5e:8", "h100:2x4", "a100:1", ""])
def test_targets_that_are_none(target):
    with pytest.raises(UserError, match=r"v5e:2x4"):
        targets.chip_of(target)


def test_a_missing_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setattr(compile_for, "installed", lambda platform: False)
    flags = type("Flags", (), {"target": "h100:8", "what": ["step"]})
    monkeypatch.setattr(compile_for, "FLAGS", flags)
    with pytest.raises(UserError, match=r"--target=h100:8: needs its compiler; pip install '\.\[aot\]'"):
        compile_for.main([])


def test_a_loop_whose_length_hangs_on_data_counts_once_and_is_said_to():
    condition = """  %m = s32[] get-tuple-element(%q), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%m, %five), direction=LT"""
    assert condition in TEXT
    other = condition.replace("ROOT %less", "%less") + "\n  ROOT %any = pred[] or(%less, %less)"
    found = costs(TEXT.replace(condition, other))
    assert (found["loop_steps"], found["unknown_loops"], found["sorts"]) == (1, 1, 1)


def test_the_table_has_every_program_and_every_refusal(tmp_path):
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    chip = targets.CHIPS["h100"]
    row = compile_for.compiled(lambda: jax.jit(lambda x: x @ x).lower(shape), chip, tmp_path / "text" / "a.txt")
    assert costs((tmp_path / "text" / "a.txt").read_text())["flops"] == row["flops"] == 2 * 64**3
    assert (row["result"], row["argument_bytes"], row["gathers"]) == ("compiled", 4 * 64**2, 0)
    assert row["memory_share"] == row["peak_bytes"] / 80e9

    def refuses():
        raise RuntimeError("\nINTERNAL: no tiles\nmore of it")

    refused = compile_for.compiled(refuses, chip)
    lines = compile_for.table([{"program": "a"} | row, {"program": "b"} | refused]).splitlines()
    assert lines[0].count("|") == lines[2].count("|") and lines[2].startswith("| a |")
    assert lines[3:] == ["b: INTERNAL: no tiles", "Times are estimates: nothing ran."]


def compiled(target: str, what: str, *flags: str) -> dict:
    """One row, from a process of its own: the compilers have to be set up before JAX starts."""
    if not targets.installed(targets.chip_of(target).platform):
        pytest.skip(f"{target} needs its compiler: pip install '.[aot]'")
    command = [sys.executable, "-m", "experiments.compile_for", "--target", target, "--what", what, "--json", *flags]
    env = os.environ | {"DEEPLAB_HUGE_PAGES": "off"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    return json.loads(done.stdout)[0]


@pytest.mark.parametrize("flags", ["", "--xla_gpu_deterministic_ops=true"])
def test_max_pool_on_gpus_scatters_nothing(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", flags)
    found = compiled("h100:1", "pool")
    assert (found["scatters"], found["gathers"], found["sorts"]) == (0, 0, 0)
    assert found["kernels"] <= 3 and found["temporary_bytes"] < 11e6  # XLA's own: 4 and 108 MB


def test_exact_filter_on_gpus_has_few_sequential_steps():
    found = compiled("h100:1", "crf.exact")
    assert found["loop_steps"] / 11 < 2000  # 10 iterations and the normalization
    assert found["temporary_bytes"] < 300e6


def test_lattice_on_gpus_has_no_chunks_and_few_kernels():
    """Of the room that hardly a photograph needs, in which channels are filtered in three parts: the dearer branch."""
    found = compiled("h100:1", "crf.permutohedral")
    assert found["kernels"] <= 58 * 10
    # 12 loops that number vertices and find neighbors; 9 iterations in three parts; lattices, the last iteration's.
    assert found["loop_steps"] - found["unknown_loops"] <= 48 and found["unknown_loops"] <= 12
    assert found["gathers"] <= 102 and found["scatters"] <= 53
    assert found["temporary_bytes"] < 270e6


@pytest.mark.long
def test_training_step_on_four_tpus():
    """Of `shapes`, end to end with its CRF: most collectives are batch norm's, forward and backward."""
    end_to_end = "--config.crf.train=end_to_end", "--config.loss.at=scores"
    found = compiled("v5e:2x2", "step", "--config=shapes", "--classes=7", *end_to_end)
    assert found["collectives"] <= 21 and found["collective_bytes"] < 1.1e6
    assert (found["gathers"], found["scatters"], found["unknown_loops"]) == (0, 0, 0)
    assert found["loop_steps"] <= 48 and found["temporary_bytes"] < 40e6


@pytest.mark.long
def test_training_step_at_one_scale_compiles_for_gpus():
    """Under the flags that training sets; without cuBLAS's products XLA finds no tile sizes."""
    found = compiled("h100:1", "step", "--config.model.scales=1.0")
    assert found["flops"] == pytest.approx(450.3e9, rel=0.01)  # three times the forward pass
    assert (found["gathers"], found["scatters"], found["loop_steps"]) == (0, 0, 0)
    assert found["kernels"] <= 1600 and found["temporary_bytes"] < 950e6


@pytest.mark.long
def test_exact_filter_on_tpus():
    found = compiled("v5e:1x1", "crf.exact")
    assert (found["gathers"], found["scatters"], found["unknown_loops"]) == (0, 0, 0)
    assert found["loop_steps"] <= 1_485_625 and found["temporary_bytes"] < 110e6


@pytest.mark.long
def test_lattice_on_tpus():
    """Of the room that hardly a photograph needs. Without neighbors: 18 gathers, 13 scatters, 340 MB, no such loops."""
    found = compiled("v5e:1x1", "crf.permutohedral")
    assert found["gathers"] <= 256 and found["scatters"] <= 31 and found["sorts"] <= 2
    assert found["loop_steps"] <= 723 and found["unknown_loops"] <= 12  # numbering vertices, finding neighbors
    assert found["temporary_bytes"] < 790e6


@pytest.mark.long
def test_separable_filter_on_tpus():
    found = compiled("v5e:1x1", "crf.separable")
    assert (found["gathers"], found["scatters"], found["sorts"], found["unknown_loops"]) == (0, 0, 0, 0)
    assert found["loop_steps"] <= 2400 and found["temporary_bytes"] < 135e6
