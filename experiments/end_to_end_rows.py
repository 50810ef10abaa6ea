"""The rows of `end_to_end`'s table: what each changes in the config, and the CRF parameters with which it is tested."""

from collections.abc import Mapping

from deeplab_jax.errors import UserError

# Shared by all rows with the CRF; the variations change one thing each.
WITH_CRF = {
    "crf.train": "end_to_end",
    "crf.train_iterations": 5,
    "crf.stride": 4,
    "crf.per_class_weights": True,
    "crf.bilateral": "permutohedral",  # testing's filter
    "loss.at": "scores",
}
ROWS: Mapping[str, Mapping[str, object]] = {
    "a": {"crf.train": "off", "loss.at": "scores"},
    "b": {**WITH_CRF, "model.freeze_network": True},
    "c": WITH_CRF,
}
WHAT = {"a": "piecewise", "b": "CRF learned, network fixed", "c": "both learned"}
VARIATIONS: Mapping[str, Mapping[str, object]] = {
    "sharp": {},  # see `Start.continuation`
    "stride8": {"crf.stride": 8, "crf.bilateral": "auto"},  # exact on so small a map, where it takes less time
    "stride2": {"crf.stride": 2},
    "stride1": {"crf.stride": 1},
    "pixels": {"loss.at": "pixels"},
    "one_weight": {"crf.per_class_weights": False},
    "no_compatibility": {"crf.learn": ("weights",)},
    "iterations10": {"crf.train_iterations": 10},
    "crf_rate10": {"crf.learning_rate_multiplier": 10.0},
    "crf_rate100": {"crf.learning_rate_multiplier": 100.0},
    "crf_loss_alone": {"loss.unary_weight": 0.0},
    "unweighted": {"loss.crf_class_weights": False},
    "no_ema": {"optimizer.ema": 0.0},
    "stored_norm": {"model.batch_norm": "frozen"},  # the start's statistics, as testing uses them
    "exact": {"crf.bilateral": "auto"},  # exact up to 4,096 positions; testing, at full size, has the lattice
    # One image at a time, momentum .99, only the loss after the CRF, at full resolution. Their rate belongs to a
    # loss summed over pixels; here a hundredth of ours is used as "tiny".
    "crfasrnn": {
        "batch_size": 1,
        "optimizer.momentum": 0.99,
        "optimizer.nesterov": False,
        "optimizer.ema": 0.0,
        "crf.stride": 1,
        "loss.unary_weight": 0.0,
        "model.batch_norm": "frozen",
    },
}
OF_A = ("pixels",)  # the variations that row a has too
CRFASRNN_RATE = 0.01  # times the other rows' learning rate
SOFTER = 6.0
EMA = 0.98  # a memory longer than the continuation would average in the start


def overrides_of(row: str) -> dict[str, object]:
    """The fields of the config that a row sets.

    Raises:
      UserError: there is no such row.
    """
    letter, _, variation = row.partition("_")
    if letter not in ROWS or (variation and variation not in (OF_A if letter == "a" else VARIATIONS)):
        raise UserError(
            f"--rows: no row {row}; give a, b, c, a_{' or a_'.join(OF_A)}, and b or c with one of "
            f"_{', _'.join(VARIATIONS)}"
        )
    return {**ROWS[letter], **(VARIATIONS[variation] if variation else {})}


def kinds_of(row: str) -> tuple[str, ...]:
    """The CRF parameters with which a row is tested.

    >>> kinds_of("a"), kinds_of("c_stride2")
    (("start's", 'searched'), ('learned', "start's", 'searched'))
    """
    if row.startswith("b"):
        return ("learned",)  # the network is the start's, and so would be a search's result
    return ("start's", "searched") if row.startswith("a") else ("learned", "start's", "searched")
