"""One small symbol for each way that an operator of MXNet can be used. Runs in MXNet's own Python: see `mxnet_zoo`."""

from collections.abc import Callable, Iterator
from typing import Any

import mxnet as mx  # type: ignore[import-not-found]

Case = tuple[str, Any, tuple[int, ...]]
IMAGE = (4, 9, 11)
ROWS = (6, 8)


def operator_cases() -> Iterator[Case]:
    """Name, symbol and shape of one input."""
    for group in (_convolutions, _dense, _pooling, _elementwise, _shapes, _slices, _reductions, _resizing, _detection):
        data = mx.sym.Variable("data")
        for number, (symbol, shape) in enumerate(group(data)):
            yield f"{group.__name__.strip('_')}-{number}", symbol, shape


def _convolutions(data: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
    conv, deconv = mx.sym.Convolution, mx.sym.Deconvolution
    yield conv(data, kernel=(3, 3), num_filter=6), IMAGE
    yield conv(data, kernel=(3, 2), num_filter=6, stride=(2, 1), pad=(1, 2), dilate=(2, 1), no_bias=True), IMAGE
    yield conv(data, kernel=(3, 3), num_filter=8, num_group=4, pad=(1, 1)), IMAGE
    yield conv(data, kernel=(3,), num_filter=5, stride=(2,), pad=(1,)), ROWS
    yield conv(data, kernel=(2, 3, 3), num_filter=5, pad=(1, 0, 1)), (3, 4, 7, 7)
    yield deconv(data, kernel=(3, 3), num_filter=6), IMAGE
    yield deconv(data, kernel=(4, 4), num_filter=4, stride=(2, 2), pad=(1, 1), num_group=4), IMAGE
    yield deconv(data, kernel=(3, 3), num_filter=6, stride=(3, 2), pad=(1, 1), adj=(2, 1), no_bias=False), IMAGE
    yield deconv(data, kernel=(3, 3), num_filter=6, stride=(2, 2), adj=(1, 1)), IMAGE
    yield deconv(data, kernel=(4, 4), num_filter=6, stride=(2, 2), target_shape=(18, 21)), IMAGE
    yield deconv(data, kernel=(3, 3), num_filter=6, dilate=(2, 2)), IMAGE
    yield deconv(data, kernel=(3,), num_filter=6, stride=(2,)), ROWS


def _dense(data: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
    dense = mx.sym.FullyConnected
    yield dense(data, num_hidden=7), IMAGE
    yield dense(data, num_hidden=7, no_bias=True), (6,)
    yield dense(data, num_hidden=7, flatten=False), ROWS
    yield dense(data, num_hidden=7, flatten=False, no_bias=True), ROWS
    for arguments in (
        {},
        {"fix_gamma": False},
        {"fix_gamma": False, "eps": 2e-5, "use_global_stats": True},
        {"fix_gamma": False, "axis": 2},
        {"fix_gamma": False, "axis": -1},
        {"fix_gamma": False, "output_mean_var": True},
    ):
        yield mx.sym.BatchNorm(data, **arguments), IMAGE
    yield mx.sym.BatchNorm(data, fix_gamma=False), (6,)
    yield mx.sym.BatchNorm_v1(data, fix_gamma=False, output_mean_var=True), IMAGE
    yield mx.sym.InstanceNorm(data), IMAGE
    yield mx.sym.InstanceNorm(data, eps=0.1), ROWS
    yield mx.sym.LayerNorm(data), ROWS
    yield mx.sym.LayerNorm(data, axis=1, eps=0.01), IMAGE
    yield mx.sym.GroupNorm(data, num_groups=2), IMAGE
    whole = mx.sym.floor(mx.sym.abs(data * 4))
    yield mx.sym.Embedding(whole, input_dim=5, output_dim=3), (6,)
    yield mx.sym.take(data, mx.sym.slice_axis(mx.sym.mean(whole, axis=2), axis=1, begin=0, end=2), axis=1), ROWS
    yield (
        mx.sym.take(mx.sym.Variable("rows_weight", shape=(4, 3), dtype="float32"), mx.sym.floor(data * 4), mode="wrap"),
        ROWS,
    )
    yield mx.sym.batch_dot(data, data, transpose_b=True), ROWS
    yield mx.sym.dot(data, mx.sym.sin(data), transpose_b=False, transpose_a=True), (6,)


def _pooling(data: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
    pool = mx.sym.Pooling
    for kind in ("max", "avg", "sum", "lp"):
        power = {"p_value": 2} if kind == "lp" else {}
        positive = mx.sym.abs(data) if kind == "lp" else data
        for convention in ("valid", "full"):
            for kernel, stride, pad in (((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((3, 2), (3, 1), (0, 1))):
                arguments = {"kernel": kernel, "stride": stride, "pad": pad, "pooling_convention": convention}
                yield pool(positive, pool_type=kind, **arguments, **power), (4, 10, 12)
                if kind == "avg":
                    yield pool(positive, pool_type=kind, count_include_pad=False, **arguments), (4, 10, 12)
        yield pool(positive, kernel=(2, 2), global_pool=True, pool_type=kind, **power), IMAGE
        if kind != "lp":
            yield pool(data, kernel=(3,), stride=(2,), pad=(1,), pool_type=kind), ROWS
            yield pool(data, kernel=(2, 2, 2), stride=(2, 2, 2), pool_type=kind), (3, 4, 6, 6)
    yield pool(data, kernel=(3, 3), pool_type="lp", p_value=1), IMAGE
    yield pool(data, kernel=(3, 3)), IMAGE
    yield pool(data, kernel=(3,), layout="NWC", stride=(2,)), ROWS
    for kind in ("max", "avg", "sum"):
        for convention in ("valid", "full"):
            arguments = {"kernel": (3, 2), "stride": (2, 2), "pad": (1, 0), "pooling_convention": convention}
            yield mx.sym.Pooling_v1(data, pool_type=kind, **arguments), (4, 10, 11)
        yield mx.sym.Pooling_v1(data, kernel=(2, 2), pool_type=kind, global_pool=True, pad=(1, 1)), IMAGE
    yield mx.sym.contrib.AdaptiveAvgPooling2D(data, output_size=(3, 4)), (4, 9, 12)
    yield mx.sym.contrib.AdaptiveAvgPooling2D(data, output_size=(6, 4)), IMAGE
    yield mx.sym.contrib.AdaptiveAvgPooling2D(data, output_size=1), IMAGE
    yield mx.sym.contrib.AdaptiveAvgPooling2D(data), IMAGE


def _elementwise(data: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
    sym = mx.sym
    for kind in ("relu", "sigmoid", "tanh", "softrelu", "softsign"):
        yield sym.Activation(data, act_type=kind), ROWS
    for kind in ("leaky", "elu", "selu", "gelu"):
        yield sym.LeakyReLU(data, act_type=kind), ROWS
    yield sym.LeakyReLU(data, act_type="elu", slope=0.7), ROWS
    yield sym.LeakyReLU(data, act_type="rrelu")[0], ROWS
    yield sym.LeakyReLU(data, act_type="rrelu", lower_bound=0.2, upper_bound=0.6)[0], ROWS
    yield sym.LeakyReLU(data, act_type="prelu"), IMAGE
    yield sym.LeakyReLU(data, sym.Variable("slope_weight", shape=(1,)), act_type="prelu"), IMAGE
    positive = sym.abs(data) + 0.1
    for name in ("relu", "sigmoid", "tanh", "softsign", "erf", "abs", "sign", "ceil", "floor", "negative", "exp"):
        yield getattr(sym, name)(data), ROWS
    for name in ("sin", "cos", "arctan", "square", "hard_sigmoid", "zeros_like", "ones_like", "identity"):
        yield getattr(sym, name)(data), ROWS
    for name in ("log", "sqrt", "rsqrt", "reciprocal"):
        yield getattr(sym, name)(positive), ROWS
    yield sym.hard_sigmoid(data, alpha=0.5, beta=0.1), ROWS
    yield sym.hard_sigmoid(data, beta=0), ROWS
    yield sym.clip(data, a_min=-0.5, a_max=0.25), ROWS
    yield sym.clip(data, a_min=-0.5, a_max=float("inf")), ROWS
    yield sym.Cast(sym.Cast(data * 9, dtype="int32"), dtype="float32"), ROWS
    for scalar in (data + 2, data - 2, 2 - data, data * 3, data / 3, 3 / positive, positive**1.5, 1.5**data):
        yield scalar, ROWS
    yield sym.maximum(data, 0.2), ROWS
    yield sym.minimum(data, 0.2), ROWS
    for answer in (data > 0.2, data >= 0.2, data < 0.2, data <= 0.2, sym.sign(data) == 1, sym.sign(data) != 1):
        yield answer, ROWS
    other, row = sym.sin(data * 7), sym.Variable("row_weight", shape=(1, 6, 1))
    for left in (data + other, data - other, data * other, data / (other + 2), positive**other):
        yield left, ROWS
    for name in ("add", "plus", "sub", "minus", "mul", "maximum", "minimum"):
        yield getattr(sym, f"broadcast_{name}")(data, row), ROWS
    for name in ("greater", "greater_equal", "lesser", "lesser_equal", "equal", "not_equal"):
        yield getattr(sym, f"broadcast_{name}")(sym.sign(data), sym.sign(row)), ROWS
    yield sym.broadcast_div(row, positive), ROWS
    yield sym.broadcast_power(positive, row), ROWS
    yield sym.maximum(data, other) + sym.minimum(data, other) * (data > other), ROWS
    yield sym.add_n(data, other, positive), ROWS
    yield sym.where(data > 0, other, positive), ROWS
    for name in ("BlockGrad", "MakeLoss", "make_loss", "Dropout"):
        yield getattr(sym, name)(data), ROWS
    for name in ("LinearRegressionOutput", "LogisticRegressionOutput", "MAERegressionOutput", "SVMOutput"):
        yield getattr(sym, name)(data, name="loss"), (6,)
    half = sym.Cast(data, dtype="float16")
    yield sym.Cast(sym.Activation(half + 1, act_type="relu"), dtype="float32"), IMAGE


def _shapes(data: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
    sym = mx.sym
    yield sym.Flatten(data), IMAGE
    yield sym.Flatten(data), (6,)
    shapes: list[tuple[int, ...]] = [(0, -1), (-1, 11), (0, 0, 99), (-3, 0, 0), (0, -3, -2), (0, -4, 2, -1, -2)]
    shapes += [(0, -4, 2, 2, -3), (0, 0, 0, 0), (-1, 0, 0, 0), (0, 3, -1, 0), (0, 44, 9), (-2, 1)]
    for shape in shapes:
        yield sym.Reshape(data, shape=shape), IMAGE
    yield sym.Reshape(data, shape=(-1, 0), reverse=True), IMAGE
    yield sym.Reshape(data, shape=(0, 0, -3), reverse=True), IMAGE
    yield sym.Reshape(sym.Reshape(data, shape=(-3, -2)), shape=(-4, -1, 4, -2)), IMAGE
    yield sym.Reshape(sym.Reshape(data, shape=(-1, 4, 99)), shape=(0, -1)), IMAGE
    yield sym.Reshape(sym.Reshape(data, shape=(-3, -2)), shape=(0, -1)), IMAGE
    yield sym.transpose(data), ROWS
    yield sym.transpose(data, axes=(0, 2, 3, 1)), IMAGE
    yield sym.SwapAxis(data, dim1=1, dim2=3), IMAGE
    yield sym.expand_dims(data, axis=1), ROWS
    yield sym.expand_dims(data, axis=-1), ROWS
    yield sym.squeeze(data, axis=2), (3, 1, 1)
    yield sym.squeeze(data, axis=(2, 3)), (3, 1, 1)
    yield sym.Concat(data, data * 2, data), IMAGE
    yield sym.Concat(data, data * 2, dim=-1), IMAGE
    yield sym.stack(data, data * 2, axis=1), ROWS
    yield sym.tile(data, reps=(1, 2, 3)), ROWS
    yield sym.tile(data, reps=(2,)), ROWS
    yield sym.repeat(data, repeats=3, axis=1), ROWS
    yield sym.reverse(data, axis=1), ROWS
    yield sym.broadcast_axis(data, axis=2, size=5), (6, 1)
    yield sym.broadcast_to(data, shape=(0, 0, 5)), (6, 1)
    yield sym.broadcast_like(data, sym.Concat(data, data, dim=2)), (6, 1)
    yield sym.depth_to_space(data, block_size=2), (8, 3, 5)
    yield sym.space_to_depth(data, block_size=2), (3, 4, 6)
    for mode in ("constant", "edge", "reflect"):
        arguments = {"constant_value": 1.5} if mode == "constant" else {}
        yield sym.Pad(data, mode=mode, pad_width=(0, 0, 0, 0, 1, 2, 3, 0), **arguments), IMAGE


def _slices(data: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
    sym = mx.sym
    yield sym.slice_axis(data, axis=1, begin=1, end=3), IMAGE
    yield sym.slice_axis(data, axis=-1, begin=-4, end=None), IMAGE
    yield sym.slice_axis(data, axis=2, begin=0, end=-2), IMAGE
    yield sym.slice(data, begin=(None, 1, 2), end=(None, 3, -1)), IMAGE
    yield sym.slice(data, begin=(None, None, None, 8), end=(None, None, None, 1), step=(None, 2, -1, -2)), IMAGE
    yield sym.slice_like(data, sym.slice_axis(data, axis=2, begin=0, end=4), axes=(2,)), IMAGE
    yield sym.slice_like(data, sym.slice_axis(data, axis=2, begin=0, end=4)), IMAGE
    yield sym.SliceChannel(data, num_outputs=2), IMAGE
    yield sym.SliceChannel(data, num_outputs=6, squeeze_axis=True), ROWS
    yield sym.SliceChannel(data, num_outputs=4, axis=2)[2], ROWS
    yield sym.Crop(data, offset=(1, 2), h_w=(5, 6), num_args=1), IMAGE
    yield sym.Crop(data, h_w=(5, 6), center_crop=True, num_args=1), IMAGE
    small = sym.slice_axis(data, axis=2, begin=0, end=4)
    yield sym.Crop(data, small, offset=(2, 0), num_args=2), IMAGE


def _reductions(data: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
    sym = mx.sym
    yield sym.softmax(data), ROWS
    yield sym.softmax(data, axis=1, temperature=2.5), ROWS
    yield sym.log_softmax(data, axis=1), ROWS
    yield sym.softmin(data), ROWS
    yield sym.SoftmaxOutput(data, name="softmax"), (6,)
    yield sym.SoftmaxOutput(data, name="softmax", multi_output=True), IMAGE
    yield sym.SoftmaxOutput(data, name="softmax", preserve_shape=True), ROWS
    yield sym.SoftmaxActivation(data), IMAGE
    yield sym.SoftmaxActivation(data, mode="channel"), IMAGE
    for name in ("mean", "sum", "max", "min", "prod", "norm"):
        reduce: Callable[..., Any] = getattr(sym, name)
        yield reduce(data, axis=1), ROWS
        yield reduce(data, axis=(-1, 1), keepdims=True), ROWS
    yield sym.mean(data, axis=0, exclude=True), IMAGE
    yield sym.sum(data, axis=(0, 1), exclude=True, keepdims=True), IMAGE
    yield sym.norm(data, ord=1, axis=2), ROWS
    yield sym.argmax(data, axis=1), ROWS
    yield sym.argmin(data, axis=2, keepdims=True), ROWS
    yield sym.argmax_channel(data), IMAGE
    for kind in ("value", "indices", "mask", "both"):
        yield sym.topk(data, k=3, ret_typ=kind), ROWS
        yield sym.topk(data, axis=1, k=2, ret_typ=kind, is_ascend=True), IMAGE
    yield sym.Cast(sym.topk(data, axis=-2, k=0, dtype="int32"), dtype="float32"), ROWS
    index = sym.floor(sym.sum(data, axis=2) * 2)
    yield sym.pick(data, index, axis=2), ROWS
    yield sym.pick(data, index, mode="wrap", keepdims=True), ROWS
    yield sym.pick(data, sym.expand_dims(sym.floor(sym.sum(data, axis=1) * 2), axis=1), axis=1), ROWS
    yield sym.one_hot(sym.floor(data * 3), depth=4), ROWS
    yield sym.one_hot(sym.floor(data * 3), depth=3, on_value=2.5, off_value=-1), ROWS
    for mode in ("instance", "channel", "spatial"):
        yield sym.L2Normalization(data, mode=mode), IMAGE
    yield sym.L2Normalization(data, mode="channel", eps=0.3), ROWS
    yield sym.LRN(data, nsize=3), IMAGE
    yield sym.LRN(data, nsize=5, alpha=0.2, beta=0.6, knorm=1), (7, 5, 5)


def _resizing(data: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
    up = mx.sym.UpSampling
    half = mx.sym.Pooling(data, kernel=(2, 2), stride=(2, 2), pool_type="avg")
    yield up(data, scale=2, sample_type="nearest"), IMAGE
    yield up(data, half, scale=2, sample_type="nearest", num_args=2), (4, 8, 12)
    yield up(data, half, scale=2, sample_type="nearest", num_args=2, multi_input_mode="sum"), (4, 8, 12)
    for scale in (2, 3):
        yield up(data, scale=scale, num_filter=4, sample_type="bilinear", num_args=2, name="up"), IMAGE
    yield mx.sym.contrib.BilinearResize2D(data, height=13, width=20), IMAGE
    yield mx.sym.contrib.BilinearResize2D(data, scale_height=2, scale_width=1.5), (4, 8, 10)
    yield mx.sym.contrib.BilinearResize2D(data, height=13, width=20, align_corners=False), IMAGE
    yield mx.sym.contrib.BilinearResize2D(data, height=13, width=1, align_corners=False), IMAGE


def _detection(data: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
    contrib, sym = mx.sym.contrib, mx.sym
    priors: list[dict[str, Any]] = [
        {},
        {"sizes": (0.2, 0.5), "ratios": (1, 2, 0.5, 3)},
        {"sizes": (0.4, 0.3), "ratios": (2, 0.5)},
        {"sizes": (0.9, 0.3), "ratios": (1, 2), "clip": True, "steps": (0.2, 0.1), "offsets": (0.3, 0.6)},
    ]
    for arguments in priors:
        prior = contrib.MultiBoxPrior(data, **arguments)
        yield sym.broadcast_add(prior, sym.Reshape(sym.mean(data, axis=0, exclude=True), shape=(0, 1, 1))), IMAGE
    # Scores of 5 classes that are exact and often equal, and offsets, for 14 · 14 anchors.
    prior = contrib.MultiBoxPrior(sym.Reshape(data, shape=(0, 0, 14, 14)), sizes=(0.3,))
    scores = sym.floor(sym.abs(sym.slice_axis(data, axis=1, begin=0, end=5)) * 8) / 32
    offsets = sym.Flatten(sym.transpose(sym.slice_axis(data, axis=1, begin=5, end=9), axes=(0, 2, 1)))
    anchors = (9, 196)
    detections: list[dict[str, Any]] = [
        {},
        {"threshold": 0.25, "nms_threshold": 0.3, "force_suppress": True},
        {"threshold": 0.3, "nms_topk": 20, "clip": False},
        {"threshold": 0.5, "nms_topk": 150},
        {"threshold": 0.2, "nms_topk": 30, "force_suppress": True, "variances": (0.2, 0.1, 0.3, 0.1)},
        {"threshold": 0.4, "nms_threshold": -1},
        {"threshold": 2.0},
        {"nms_threshold": 1.0, "background_id": 1},
    ]
    for arguments in detections:
        yield contrib.MultiBoxDetection(scores, offsets, prior, **arguments), anchors
    yield contrib.MultiBoxDetection(scores, offsets * 0, prior, nms_threshold=0.5), anchors
    # Rows of class, score, and two corners or a centre and sides.
    label = sym.floor(sym.abs(sym.slice_axis(data, axis=2, begin=0, end=1)) * 2)
    score = sym.floor(sym.slice_axis(data, axis=2, begin=1, end=2) * 8) / 8
    low = sym.slice_axis(data, axis=2, begin=2, end=4)
    side = sym.abs(sym.slice_axis(data, axis=2, begin=4, end=6)) * 2
    corners = sym.Concat(label, score, low, low + side, dim=2)
    centres = sym.Concat(label, score, low, side, dim=2)
    turned = sym.Concat(label, score, low, low + side - 0.5, dim=2)
    last = sym.Concat(low, low + side, score, dim=2)
    nms = contrib.box_nms
    suppressions: list[dict[str, Any]] = [
        {},
        {"overlap_thresh": 0.2, "id_index": 0},
        {"overlap_thresh": 0.2, "id_index": 0, "force_suppress": True, "topk": 9},
        {"overlap_thresh": 0.2, "id_index": 0, "background_id": 0, "valid_thresh": -0.3},
        {"overlap_thresh": 0.1, "valid_thresh": -9, "topk": 30, "id_index": 0},
        {"overlap_thresh": 0.3, "out_format": "center", "id_index": 0},
        {"valid_thresh": 99},
        {"topk": 0},
    ]
    for arguments in suppressions:
        yield nms(corners, **arguments), (40, 6)
        yield nms(turned, **arguments), (40, 6)
        yield nms(centres, **{"in_format": "center", **arguments}), (40, 6)
    behind = sym.Concat(label - 1, score, low, low + side, dim=2)
    yield nms(behind, id_index=0, overlap_thresh=0.2), (40, 6)
    yield nms(behind, id_index=0, background_id=1, valid_thresh=-9), (40, 6)
    for threshold in (0, 0.5, 1, 2):  # squares that are the same, or half the same, or beside each other
        whole = sym.Concat(label, score, sym.floor(low), sym.floor(low) + 2, dim=2)
        half = sym.Concat(label, score, sym.floor(low), sym.floor(low) + 1 + sym.floor(sym.abs(low)), dim=2)
        yield nms(whole, overlap_thresh=threshold, valid_thresh=-9), (40, 6)
        yield nms(half, overlap_thresh=threshold, valid_thresh=-9), (40, 6)
    yield nms(last, coord_start=0, score_index=4, overlap_thresh=0.2), (40, 6)
    yield nms(sym.Reshape(corners, shape=(0, 2, 20, 6)), overlap_thresh=0.2), (40, 6)
