"""PASCAL-Person-Part, 6 parts and background (v2: 64.94 with CRF, second-hand, and with MSC rather than ASPP)."""

from deeplab_jax.configs import voc_aspp_l


def get_config():
    config = voc_aspp_l.get_config()
    config.data.update(name="pascal_person_part", train_split="train")
    # The parts (head, torso, upper and lower arms, upper and lower legs) have no left or right; nothing is swapped.
    config.data.mirror_swaps = ()
    return config
