"""MS-COCO with VOC's classes, the stage before VOC: --config.init_from=runs/coco_pretrain starts the next one."""

from deeplab_jax.configs import voc_aspp_l


def get_config():
    config = voc_aspp_l.get_config()
    config.data.update(name="coco_voc", train_split="train")
    # The papers give no schedule for this stage: the number of steps is unverified.
    config.num_steps = 40_000
    return config
