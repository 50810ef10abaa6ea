"""SIGTERM: once for a tidy end, twice for one at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from deeplab_jax.training.termination import Terminated, TermSignal, interruptible

# A computation of hours, during which Python's own handler cannot run.
BUSY = """
import jax, jax.numpy as jnp
from deeplab_jax.training.termination import TermSignal
run = jax.jit(lambda x: jax.lax.fori_loop(0, 2**31 - 2, lambda i, x: jnp.sin(x) + jnp.cos(x @ x), x))
run = run.lower(jnp.ones((64, 64))).compile()
with TermSignal():
    print("busy", flush=True)
    run(jnp.ones((64, 64))).block_until_ready()
"""


def test_a_second_sigterm_ends_a_process_inside_xla():
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"busy\n"
    time.sleep(1)  # computing
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None  # one SIGTERM waits for the step's end
    process.terminate()
    assert process.wait(timeout=20) in (143, -signal.SIGTERM)


def test_the_first_sigterm_is_noted_and_the_handler_taken_away():
    before = signal.getsignal(signal.SIGTERM)
    with TermSignal() as stop:
        assert not stop.arrived
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.arrived
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_what_may_be_interrupted_is():
    with TermSignal() as stop, pytest.raises(Terminated) as e, stop.interrupting():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert e.value.code == 143
    with pytest.raises(Terminated), stop.interrupting():  # it had come before
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_signal_before_the_training_ends_it_and_changes_nothing(tmp_path, monkeypatch, capfd, number, status, name):
    from deeplab_jax.training import loop

    monkeypatch.setattr(loop, "prepare", lambda *args: (os.kill(os.getpid(), number), time.sleep(60)))
    with pytest.raises(Terminated) as e:
        loop.train(None, tmp_path / "w")
    assert e.value.code == status
    assert capfd.readouterr().err == f"{name}: stopped before the training began; the workdir is unchanged\n"
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("swallowed", [False, True])
def test_a_signal_elsewhere_has_its_sentence(capfd, swallowed):
    """As `main` wraps everything, the final evaluation included; C code may make another exception of it."""
    with pytest.raises(Terminated) as e, interruptible("stopped; more"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Terminated:
            if swallowed:
                raise ImportError("initialization failed") from None
            raise
    assert e.value.code == 143
    assert capfd.readouterr().err == "SIGTERM: stopped; more\n"


def test_what_was_said_further_in_is_said_once(capfd):
    with pytest.raises(Terminated) as e, interruptible("outer"), interruptible("inner"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    assert e.value.code == 130
    assert capfd.readouterr().err == "Ctrl-C: inner\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_reader_of_stderr_that_ended_by_the_same_signal_takes_nothing_along(number):
    """As of `main 2>&1 | tee log`: the state must be saved, with nobody left to read about it."""
    code = f"""
import os, sys
from deeplab_jax.console import say
from deeplab_jax.training.termination import TermSignal
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(writer)
os.close(reader)
with TermSignal() as stop:
    os.kill(os.getpid(), {int(number)})
    say("saved")
    say("and stopping")
    print("arrived", stop.arrived)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"arrived {int(number)}\n"), done.stderr


def test_ctrl_c_keeps_its_status_without_a_reader():
    code = """
import os, signal
from deeplab_jax import interrupts
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(writer)
os.close(reader)
interrupts.end_at_once()
os.kill(os.getpid(), signal.SIGINT)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 130


def test_a_signal_where_no_step_is_left_is_heard(runs, tmp_path, monkeypatch, capfd):
    from deeplab_jax.training import loop

    config = runs.config("num_steps=2", "eval.every=0", "eval.select_split=", "log.images_every=0")
    loop.train(config, tmp_path)
    begun = loop.Reporter

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return begun(*args, **kwargs)

    monkeypatch.setattr(loop, "Reporter", signalled)
    with pytest.raises(Terminated) as ended:
        loop.train(config, tmp_path)
    assert ended.value.code == 143 and "SIGTERM: saved step 2 and stopping" in capfd.readouterr().err
