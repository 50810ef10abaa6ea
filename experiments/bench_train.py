"""Speed and memory of training: ResNet-101 with ASPP-L at 321 x 321 versus PyTorch, and other costs of a run.

    python -m experiments.bench_train [--only train,crf] [--rounds 7] [--out runs/bench]

train   images/s of a training step at batch 1 over PyTorch's, same network, weights, batch and threads: channels-last,
        the faster of eager and torch.compile (`pip install torch`; omitted if missing). Alternating systems, medians.
crf     a training step with the CRF end to end on the 41 x 41 map, 5 iterations, relative to one without.
full    the small network of `camvid` at 241 x 321, 11 classes, batch 6: a step with the CRF at full resolution, 5
        iterations, relative to one without; wall and CPU time, peak memory of the process.
devices images/s on 2 virtual CPU devices over 1, batch 2 in total.
start   from the start of the process to the end of the first step, with an empty and a filled compilation cache.
memory  peak memory of a process that executes one step at batch 10, accumulated over micro-batches of 1.
stable  200 steps of the small network: steps/s, memory and compilations in each fifth.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli
from deeplab_jax.errors import UserError
from experiments.children import Child, work_when_asked
from experiments.timing import in_turn, median_ratio, rss_mib, threads

FLAGS = flags.FLAGS
SIZE = (321, 321)
CLASSES = 21


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_list("only", ["train", "crf", "full", "devices", "start", "memory", "stable"], "rows to measure")
    flags.DEFINE_integer("rounds", 7, "rounds of alternating systems", lower_bound=1)
    flags.DEFINE_bool("compile_peer", True, "also try torch.compile")
    flags.DEFINE_string("out", "runs/bench", "folder for bench_train.json")
    flags.DEFINE_string("worker", "", "internal: batch size, micro-batches and a kind of step, for a child process")


def main(argv: Sequence[str]) -> None:
    """Prints and writes the measurements."""
    del argv
    if FLAGS.worker:
        return worker(*FLAGS.worker.split(","))
    unknown = set(FLAGS.only) - set(ROWS)
    if unknown:
        raise UserError(f"--only names {sorted(unknown)}; choose from {', '.join(ROWS)}")
    import jax

    path = Path(FLAGS.out) / "bench_train.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    results |= {"jax": jax.__version__, "platform": jax.default_backend(), "threads": threads()}
    for name in FLAGS.only:
        results[name] = ROWS[name]() | {"xla_flags": os.environ.get("XLA_FLAGS", "")}
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


# ---- our step ------------------------------------------------------------------------------------------------------


def training_step(batch_size: int, accumulate: int = 1, crf: bool = False) -> Callable[[], dict]:
    """One training step like that of `deeplab_jax.main`, on a batch in memory, as a function without arguments.

    Args:
      batch_size: images in a step, over all devices.
      accumulate: micro-batches in a step.
      crf: with the CRF end to end at stride 8, 5 iterations.

    Returns:
      A function that executes a step, waits for it and returns its metrics.
    """
    import jax

    from deeplab_jax.config import load_config
    from deeplab_jax.models import create_model
    from deeplab_jax.training.optimizer import create_optimizer
    from deeplab_jax.training.state import create_state
    from deeplab_jax.training.step import AXIS, create_train_step, replicate, shard
    from experiments.plausible_weights import plausible_variables

    overrides = ["model.scales=1.0,", f"batch_size={batch_size}", f"optimizer.accumulate={accumulate}"]
    if crf:
        overrides += ["crf.train=end_to_end", "crf.train_iterations=5", "crf.stride=8"]
    config = load_config("voc_aspp_l", overrides)
    variables = plausible_variables(config.model, CLASSES)
    model = create_model(config.model, CLASSES, crf=config.crf)
    if crf:
        layer = jax.jit(lambda key: model.init(key, jax.numpy.zeros((1, *SIZE, 3)))["params"]["crf"])
        variables["params"]["crf"] = layer(jax.random.key(0))
    optimizer = create_optimizer(config)
    step = create_train_step(model.clone(axis_name=AXIS), config, optimizer, None)
    state = replicate(create_state(variables, config, optimizer))
    batch = shard(random_batch(batch_size), accumulate)

    def run() -> dict:
        nonlocal state
        state, metrics = step(state, batch)
        return jax.block_until_ready(metrics)

    return run


def camvid_step(batch_size: int, crf: bool) -> Callable[[], dict]:
    """Like `training_step`, for `camvid`'s network; with `crf` the CRF follows at full resolution, 5 iterations."""
    import jax

    from deeplab_jax.config import load_config
    from deeplab_jax.training import setup
    from deeplab_jax.training.optimizer import create_optimizer
    from deeplab_jax.training.state import create_state
    from deeplab_jax.training.step import AXIS, create_train_step, replicate, shard

    overrides = ["crf.train=end_to_end", "crf.train_iterations=5", "crf.stride=1", "loss.at=pixels"] if crf else []
    config = load_config("camvid", [f"batch_size={batch_size}", *overrides])
    model, optimizer = setup.build_model(config, 11), create_optimizer(config)
    state = replicate(create_state(setup.initial_variables(config, model), config, optimizer))
    step = create_train_step(model.clone(axis_name=AXIS), config, optimizer, None)
    batch = shard(random_batch(batch_size, config.data.crop, 11), 1)

    def run() -> dict:
        nonlocal state
        state, metrics = step(state, batch)
        return jax.block_until_ready(metrics)

    return run


def random_batch(batch_size: int, size: tuple[int, int] = SIZE, classes: int = CLASSES) -> dict:
    """Smooth noise with labels in blocks, a tenth of them void."""
    import numpy as np

    rng = np.random.default_rng(0)

    def blocks(high: int, *channels: int) -> np.ndarray:
        coarse = rng.integers(0, high, (batch_size, 41, 41, *channels))
        return coarse.repeat(8, 1).repeat(8, 2)[:, : size[0], : size[1]].astype(np.uint8)

    label = blocks(classes)
    label[blocks(10) == 0] = 255
    valid, index = np.ones((batch_size, *size), bool), np.arange(batch_size, dtype=np.int32)
    return {"image": blocks(256, 3), "label": label, "valid": valid, "index": index}


# ---- rows ----------------------------------------------------------------------------------------------------------


def train() -> dict:
    """Images/s at batch 1, ours over PyTorch's, each in its own process: two thread pools in one interfere."""
    ours = child("1,1,plain")
    systems = {"ours": ours.work}
    try:
        notes = peer(systems) if _has_torch() else {"peer": "PyTorch is not installed"}
        return _compare(systems, in_turn(systems, FLAGS.rounds)) | notes
    finally:
        ours.close()


def peer(systems: dict[str, Callable]) -> dict[str, str]:
    """Adds PyTorch's training step to the systems: the same network, loss, frozen parts, momentum and decay."""
    import torch
    import torch.nn.functional as F

    from deeplab_jax.config import load_config
    from experiments.plausible_weights import plausible_variables
    from experiments.torch_network import DeepLab, compiled, network_input

    torch.set_num_threads(threads())
    batch = random_batch(1)
    image, label = network_input(batch["image"]), torch.from_numpy(batch["label"][:, ::8, ::8].astype("int64"))
    variables = plausible_variables(load_config("voc_aspp_l", []).model, CLASSES)
    net = DeepLab(CLASSES).load(variables)
    optimizer = torch.optim.SGD(net.parameters(), 2.5e-4, momentum=0.9, weight_decay=5e-4, foreach=True)

    def step(forward: Callable) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward(image), label, ignore_index=255)
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step(net)
    mine = float(random_loss(variables))
    if abs(first - mine) > 1e-3 * abs(mine):
        raise AssertionError(f"the two networks differ: loss {first} and {mine}")
    systems["torch eager"] = lambda: step(net)
    fast, note = compiled(net, step) if FLAGS.compile_peer else (None, "torch.compile not tried")
    if fast is not None:
        systems["torch compiled"] = lambda: step(fast)
    return {"torch": torch.__version__, "note": note, "loss_ours_and_torch": [mine, first]}


def random_loss(variables: dict):
    """The loss of our network on the batch, computed separately from the step."""
    import jax
    import jax.numpy as jnp

    from deeplab_jax.config import load_config
    from deeplab_jax.models import create_model

    model = create_model(load_config("voc_aspp_l", ["model.scales=1.0,"]).model, CLASSES)
    batch = random_batch(1)
    scores, _ = jax.jit(lambda v, x: model.apply(v, x))(variables, batch["image"])
    label = batch["label"][:, ::8, ::8].astype("int32")
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(scores), (label % 255)[..., None], -1)[..., 0]
    return -(log_probs * (label != 255)).sum() / (label != 255).sum()


def crf() -> dict:
    """Seconds of a step with the CRF end to end over one without."""
    systems = {"plain": training_step(1), "with CRF": training_step(1, crf=True)}
    for run in systems.values():
        run()
    seconds = in_turn(systems, FLAGS.rounds)
    return _medians(seconds) | {"time_with_over_without": median_ratio(seconds["with CRF"], seconds["plain"])}


def full() -> dict:
    """The time and memory that the CRF at full resolution adds to a step of the small network."""
    children = {name: child(f"6,1,{kind}") for name, kind in (("plain", "camvid"), ("with CRF", "camvid_crf"))}
    before = {name: one.work()["cpu_s"] for name, one in children.items()}
    try:
        seconds = in_turn({name: one.work for name, one in children.items()}, FLAGS.rounds)
        facts = {name: one.work() for name, one in children.items()}
    finally:
        for one in children.values():
            one.close()
    steps = 2 * FLAGS.rounds + 1  # each turn has one warm-up step and one that counts
    used = {name: (facts[name]["cpu_s"] - start) / steps for name, start in before.items()}
    return _medians(seconds) | {
        "time_with_over_without": median_ratio(seconds["with CRF"], seconds["plain"]),
        "cpu_s_per_step": {name: round(value, 3) for name, value in used.items()},
        "cpu_with_over_without": used["with CRF"] / used["plain"],
        "peak_mib": {name: round(f["peak_mib"]) for name, f in facts.items()},
    }


def devices() -> dict:
    """Throughput on two virtual devices over one, batch 2 in all."""
    children = {n: child("2,1,plain", devices=n) for n in (1, 2)}
    try:
        seconds = in_turn({n: one.work for n, one in children.items()}, FLAGS.rounds)
    finally:
        for one in children.values():
            one.close()
    return _medians(seconds) | {"throughput_2_over_1": median_ratio(seconds[1], seconds[2])}


def start() -> dict:
    """Seconds to the end of the first step, and of which compilation, with a cold and a warm cache."""
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        for kind in ("cold", "warm"):
            one = child("1,1,plain", cache=cache)
            results[kind] = {k: round(v, 1) for k, v in one.facts.items()}
            one.close()
    return results


def memory() -> dict:
    """Peak memory of a process that trains at batch 10, micro-batches of 1."""
    one = child("10,10,plain")
    start = time.perf_counter()
    facts = one.work()
    seconds = time.perf_counter() - start
    one.close()
    return {"peak_mib": round(facts["peak_mib"]), "seconds_per_step": round(seconds, 1)}


def stable() -> dict:
    """Steps/s, resident memory and compilations of the small network over 200 steps, in fifths."""
    import jax

    from deeplab_jax.config import load_config
    from deeplab_jax.data import open_dataset, train_batches
    from deeplab_jax.training import setup
    from deeplab_jax.training.optimizer import create_optimizer
    from deeplab_jax.training.state import create_state
    from deeplab_jax.training.step import AXIS, create_train_step, replicate, shard

    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compilations.append(event) if event.endswith("backend_compile_duration") else None
    )
    config = load_config("shapes", ["crf.train=end_to_end", "loss.at=scores"])
    dataset = open_dataset(config.data, "train")
    model = setup.build_model(config, dataset.num_classes)
    optimizer = create_optimizer(config)
    step = create_train_step(model.clone(axis_name=AXIS), config, optimizer, None)
    state = replicate(create_state(setup.initial_variables(config, model), config, optimizer))
    log, before, began = [], 0, time.perf_counter()
    batches = train_batches(dataset, config)
    for n in range(1, 201):
        state, metrics = step(state, shard(next(batches), 1))
        jax.block_until_ready(metrics)
        if n == 1 or n % 40 == 0:
            now = time.perf_counter()
            row = {"step": n, "steps_per_s": round((n - before) / (now - began), 2), "rss_mib": round(rss_mib())}
            log.append(row | {"compilations": len(compilations)})
            print(json.dumps(log[-1]), file=sys.stderr, flush=True)
            before, began = n, now
            compilations.clear()
    batches.close()
    return {"log": log}


ROWS = {
    "train": train,
    "crf": crf,
    "full": full,
    "devices": devices,
    "start": start,
    "memory": memory,
    "stable": stable,
}


# ---- child processes -----------------------------------------------------------------------------------------------


def child(what: str, **options) -> Child:
    """A process that executes a step on each request; what: see the flag `worker`."""
    return Child("experiments.bench_train", f"--worker={what}", **options)


def worker(batch_size: str, accumulate: str, kind: str) -> None:
    """The child process: builds, executes one step, reports; then one step per request."""
    import jax

    spent = {"compile": 0.0}

    def listen(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            spent["compile"] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    if kind.startswith("camvid"):
        run = camvid_step(int(batch_size), crf=kind == "camvid_crf")
    else:
        run = training_step(int(batch_size), int(accumulate), crf=kind == "crf")
    began = time.perf_counter()
    run()
    ready = spent | {"first_step": time.perf_counter() - began}
    work_when_asked(
        run,
        ready,
        lambda: {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "cpu_s": time.process_time()},
    )


# ---- results -------------------------------------------------------------------------------------------------------


def _has_torch() -> bool:
    import importlib.util

    return importlib.util.find_spec("torch") is not None


def _medians(seconds: dict) -> dict:
    return {f"seconds {name}": round(statistics.median(values), 3) for name, values in seconds.items()}


def _compare(systems: dict, seconds: dict[str, list[float]]) -> dict:
    """Medians, and the speed of ours relative to the faster of the peers."""
    peers = [name for name in systems if name != "ours"]
    result = _medians(seconds)
    if peers:
        best = min(peers, key=lambda name: statistics.median(seconds[name]))
        result |= {"best_peer": best, "ours_over_peer": round(median_ratio(seconds[best], seconds["ours"]), 3)}
    return result


if __name__ == "__main__":
    define_flags()
    cli.run(main)
