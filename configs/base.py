"""Every field of a run, with its default. The other configs change a few of them; flags change the rest."""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    """Returns the defaults: ResNet-101 with ASPP-L on PASCAL VOC 2012, CRF at test time only."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 10  # global: over all devices and processes
    config.num_steps = 20_000
    config.init_from = ""  # converted weights (.safetensors) or a workdir to start from; "" = random

    config.model = ConfigDict()
    config.model.backbone = "resnet101"  # resnet101, resnet50, vgg16, resnet_small
    config.model.head = "aspp"  # aspp, largefov, fc (v1's fc6/fc7/fc8), plain (one 1x1 classifier)
    config.model.head_rates = (6, 12, 18, 24)  # atrous rates at output stride 8; halved at 16, a quarter at 32
    config.model.head_width = 0  # hidden channels of the head; 0 = the published ones
    config.model.head_kernel = 3  # v1's fc6: 3, 4 or 7
    config.model.output_stride = 8  # 8, 16 or 32
    config.model.scales = (1.0,)  # multi-scale inputs, fused by max (v2 section 4.1): (1.0, 0.75, 0.5)
    config.model.msc = False  # v1's side branches (v1 section 4.3)
    config.model.pool5a = False  # v1 LargeFOV's average pool after pool5
    config.model.base_pools = False  # v1 DeepLab's 2x2 pools instead of LargeFOV's 3x3
    config.model.freeze_trunk = False  # train only the layers that MSc adds
    config.model.freeze_network = False  # train only the CRF (with crf.train end_to_end)
    config.model.batch_norm = "frozen"  # frozen (stored statistics and affine) or trained (synchronised)
    config.model.allow_random_frozen = False  # frozen batch norm without init_from is a mistake; True allows it
    config.model.stride_on = "1x1"  # where a bottleneck's stride sits: 1x1 (Caffe) or 3x3 (torchvision)
    # caffe_bgr (mean subtraction), torch_rgb (/255, mean, std), or own_rgb (each photograph's own mean and std)
    config.model.preprocessing = "caffe_bgr"
    config.model.resize = "corners"  # bilinear resize: corners (Caffe, the papers) or half_pixel (deeplab-pytorch)
    config.model.dropout = 0.5  # VGG's fc6 and fc7
    config.model.widths = (64, 128, 192, 192)  # resnet_small only: channels per stage
    config.model.blocks = (2, 2, 2, 2)  # resnet_small only: basic blocks per stage
    config.model.fine_branch = 0  # resnet_small only: channels of a branch that makes scores of stride 4; 0 = none
    config.model.dtype = "float32"  # compute type: float32 or bfloat16 (parameters stay float32)
    config.model.matmul_precision = "default"  # of float32 products: default, high, highest (docs/scaling.md)
    config.model.remat = False  # recompute blocks in the backward pass to save memory

    config.crf = ConfigDict()
    config.crf.iterations = 10  # mean-field iterations; 0 = no CRF
    config.crf.bilateral = "auto"  # auto, permutohedral, exact, separable
    config.crf.normalization = "after"  # none, before, after, symmetric
    # A name in crf.PRESETS, a preset file (.json), or "" = the five fields below, which count only then.
    config.crf.preset = "v2_resnet101"
    config.crf.bilateral_weight = _number_or_more(4.0)  # w1; or one for each class: 1,1,4
    config.crf.bilateral_xy_std = 67.0  # sigma_alpha, pixels of the photograph
    config.crf.bilateral_rgb_std = 3.0  # sigma_beta, 0..255
    config.crf.gaussian_weight = _number_or_more(3.0)  # w2; or one for each class
    config.crf.gaussian_xy_std = 1.0  # sigma_gamma, pixels of the photograph
    config.crf.train = "off"  # off (test time only, the papers' piecewise way) or end_to_end
    config.crf.train_iterations = 5  # iterations of the CRF inside training
    config.crf.stride = 8  # in training the CRF runs on the image sampled at this stride; testing uses 1
    config.crf.learn = ("weights", "compatibility")  # what end_to_end learns: weights, compatibility, stds
    config.crf.per_class_weights = False  # one kernel weight per class instead of one per kernel
    config.crf.learning_rate_multiplier = 1.0

    config.search = ConfigDict()  # after training: search of the CRF's parameters on held-out images
    # Number of held-out images (data.holdout) to use; 0 = no search. Without data.holdout they are those of eval.split,
    # and the accuracy reported for that split looks too good.
    config.search.images = 0
    config.search.passes = 2  # 1 = coarse grid only; each further pass halves the steps
    config.search.objective = "mean_iou"  # mean_iou, trimap (within 5 pixels of boundaries) or both (their mean)
    config.search.thin = ()  # names of thin classes: their bilateral weight is a searched multiple of the others'
    config.search.learn = 0  # then this many passes over those images that learn one weight per kernel and class
    config.search.grid = ConfigDict()  # the coarse grid of that search (the papers': v2 section 5)
    config.search.grid.bilateral_weight = (3.0, 4.0, 5.0, 6.0)
    config.search.grid.bilateral_xy_std = (30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0)
    config.search.grid.bilateral_rgb_std = (3.0, 4.0, 5.0, 6.0)
    config.search.grid.gaussian_weight = (3.0,)
    config.search.grid.gaussian_xy_std = (3.0,)
    config.search.grid.thin_factor = (1.0, 2.0, 3.0, 4.0)  # counts only where search.thin names classes

    config.data = ConfigDict()
    config.data.name = "voc_segmentation"
    config.data.dir = ""  # the raw folder, never written to
    config.data.cache_dir = ""  # prepared files; "" = the user's cache folder
    config.data.train_split = "train_aug"
    config.data.holdout = 0  # number of training images set aside as the split "holdout"
    config.data.holdout_by = ""  # instead, all training images with these prefixes, such as drives: "0016E5,0001TP"
    config.data.crop = (321, 321)  # height, width
    config.data.scales = (0.5, 0.75, 1.0, 1.25, 1.5)  # random scale; a pair with continuous_scale = its ends
    config.data.continuous_scale = False
    # First steps with their own crops and scales, usually smaller and cheaper: (share of the steps, crop, scales), one
    # after another; the remaining steps use `crop` and `scales`.
    config.data.stages = ()  # such as ((0.5, (161, 161), (0.25, 0.375, 0.5, 0.625, 0.75)),)
    config.data.mirror = True
    config.data.mirror_swaps = ()  # pairs of class ids that swap when mirrored (left/right parts)
    config.data.brightness = 0.0  # photometric jitter: +- this fraction
    config.data.contrast = 0.0
    config.data.saturation = 0.0
    config.data.gamma = 0.0  # exposure: values in 0..1 to the power of 2 ** (+- this)
    config.data.color_cast = 0.0  # each of R, G, B by its own factor: +- this fraction
    config.data.blur = 0.0  # half of the examples get a Gaussian blur of up to this many pixels
    config.data.on_corrupt = "stop"  # a corrupt image: stop (naming it) or skip (and count)
    config.data.workers = 2  # threads that decode and augment
    config.data.cache_decoded_mb = 2048  # decoded images are kept in memory up to this size
    config.data.images = ""  # folder: images, masks (folders or list files)
    config.data.masks = ""
    config.data.classes = ""  # folder: text file, one name and optional R G B per line, or a tool's list
    config.data.val_fraction = 0.1  # folder: share of images for validation, drawn by config.seed
    config.data.train_list = ""  # folder: text files of names, or folders of images, instead of val_fraction
    config.data.val_list = ""
    config.data.ignore = (255,)  # folder: ids of the masks that are void
    config.data.reduce_zero = False  # folder: 0 is void and the first class is 1
    config.data.mask_prefix = ""  # folder: text before an image's name in its mask's name
    config.data.mask_suffix = ""  # folder: text after it, such as _gt; both "" = the usual ones

    config.loss = ConfigDict()
    config.loss.class_weights = ()  # one weight per class; () = none; ("sqrt",) or another of class_weights.RULES
    config.loss.unary_weight = 1.0  # end_to_end: weight of the loss on the scores before the CRF
    config.loss.crf_class_weights = True  # end_to_end: whether class_weights also apply to the loss after the CRF
    config.loss.at = "scores"  # scores (labels subsampled, the papers) or pixels (scores upsampled)

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"  # momentum SGD, Caffe's form
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "poly"  # poly, step, constant, cosine
    config.optimizer.poly_power = 0.9
    config.optimizer.step_size = 2000  # schedule "step": times 0.1 every this many steps
    config.optimizer.warmup_steps = 0
    config.optimizer.classifier_multiplier = 10.0  # classifier weights; its bias gets twice that
    config.optimizer.bias_multiplier = 2.0  # every other bias; biases have no decay
    config.optimizer.accumulate = 1  # micro-batches per step (the papers' iter_size)
    config.optimizer.clip_norm = 0.0  # global gradient norm; 0 = no clipping
    config.optimizer.ema = 0.0  # decay of averaged weights used in evaluation; 0 = none
    config.optimizer.skip_nonfinite = False  # skip and count steps with a non-finite gradient (bfloat16)

    config.eval = ConfigDict()
    config.eval.split = "val"
    config.eval.crf_iterations = (0, 1, 2, 5, 10)  # one result for each, in one pass; 0 = without the CRF
    config.eval.every = 0  # steps between evaluations on `select_split`, and only if that is set; 0 = none
    config.eval.select_split = ""  # split on which the best checkpoint is chosen; "" = the last is used
    config.eval.limit = 0  # evaluate only the first images; 0 = all
    config.eval.scales = (1.0,)  # test-time scales, averaged
    config.eval.mirror = False  # average with the mirrored image
    config.eval.tile = 0  # overlapping tiles of this side for large images; 0 = whole image
    config.eval.batch_size = 1
    config.eval.size_multiple = 32  # images are padded to a multiple of this plus one: few compiled shapes
    config.eval.trimap_widths = tuple(range(1, 41))  # bands around boundaries, in pixels; tables show a few of many
    config.eval.trimap_source = "boundary"  # boundary, or void (the papers' rule)
    config.eval.overlays = 4  # pictures written: photo, truth, network, network + CRF
    config.eval.submission = ""  # write test-server files: voc or cityscapes

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000  # steps
    config.checkpoint.keep = 2  # newest checkpoints kept, besides the best

    config.log = ConfigDict()
    config.log.every = 20  # steps between lines, and between checks that loss and gradient are finite
    config.log.images_every = 1000  # steps between training pictures in TensorBoard; 0 = none
    return config


def _number_or_more(default):
    """A field that also takes a tuple: others keep the type of their default."""
    return FieldReference(default, field_type=object)
