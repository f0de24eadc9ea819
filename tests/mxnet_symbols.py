"""The networks of MXNet's example/image-classification and example/ssd. Runs in MXNet's own Python: see `mxnet_zoo`.

What is in the originals for training or for other sizes of images is left out; names and attributes are theirs.
"""

from collections.abc import Callable
from typing import Any

import mxnet as mx  # type: ignore[import-not-found]

CLASSES = 50


def _classifier(features: Any, name: str = "fc1") -> Any:
    hidden = mx.sym.FullyConnected(mx.sym.Flatten(features, name="flatten"), num_hidden=CLASSES, name=name)
    return mx.sym.SoftmaxOutput(hidden, name="softmax")


def _norm(data: Any, name: str, **arguments: Any) -> Any:
    return mx.sym.BatchNorm(data, name=name, **{"fix_gamma": False, "eps": 2e-5, "momentum": 0.9, **arguments})


def _relu(data: Any, name: str) -> Any:
    return mx.sym.Activation(data, act_type="relu", name=name)


def _conv(data: Any, filters: int, kernel: int, name: str, stride: int = 1, pad: int = 0, **arguments: Any) -> Any:
    square = {"kernel": (kernel, kernel), "stride": (stride, stride), "pad": (pad, pad)}
    return mx.sym.Convolution(data, num_filter=filters, name=name, **square, **arguments)


def resnet_v2(units: tuple[int, ...], filters: tuple[int, ...], bottleneck: bool) -> Any:
    """resnet.py: full pre-activation; `bn_data` takes raw pixels."""

    def unit(data: Any, count: int, stride: int, same: bool, name: str) -> Any:
        first = _relu(_norm(data, f"{name}_bn1"), f"{name}_relu1")
        inner = count // 4 if bottleneck else count
        if bottleneck:
            way = _conv(first, inner, 1, f"{name}_conv1", no_bias=True)
            way = _relu(_norm(way, f"{name}_bn2"), f"{name}_relu2")
            way = _conv(way, inner, 3, f"{name}_conv2", stride, 1, no_bias=True)
            way = _relu(_norm(way, f"{name}_bn3"), f"{name}_relu3")
            way = _conv(way, count, 1, f"{name}_conv3", no_bias=True)
        else:
            way = _conv(first, count, 3, f"{name}_conv1", stride, 1, no_bias=True)
            way = _relu(_norm(way, f"{name}_bn2"), f"{name}_relu2")
            way = _conv(way, count, 3, f"{name}_conv2", 1, 1, no_bias=True)
        return way + (data if same else _conv(first, count, 1, f"{name}_sc", stride, no_bias=True))

    body = _norm(mx.sym.Variable("data"), "bn_data", fix_gamma=True)
    body = _conv(body, filters[0], 7, "conv0", 2, 3, no_bias=True, workspace=256)
    body = _relu(_norm(body, "bn0"), "relu0")
    body = mx.sym.Pooling(body, kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type="max")
    for stage, count in enumerate(units):
        for number in range(count):
            stride = 2 if stage and not number else 1
            body = unit(body, filters[stage + 1], stride, number > 0, f"stage{stage + 1}_unit{number + 1}")
    body = _relu(_norm(body, "bn1"), "relu1")
    return _classifier(mx.sym.Pooling(body, global_pool=True, kernel=(7, 7), pool_type="avg", name="pool1"))


def resnet_v1(units: tuple[int, ...], filters: tuple[int, ...]) -> Any:
    """resnet-v1.py: the bottleneck, with the normalisation behind each convolution."""

    def unit(data: Any, count: int, stride: int, same: bool, name: str) -> Any:
        way = _norm(_conv(data, count // 4, 1, f"{name}_conv1", stride, no_bias=True), f"{name}_bn1")
        way = _norm(_conv(_relu(way, f"{name}_relu1"), count // 4, 3, f"{name}_conv2", 1, 1), f"{name}_bn2")
        way = _norm(_conv(_relu(way, f"{name}_relu2"), count, 1, f"{name}_conv3"), f"{name}_bn3")
        if not same:
            data = _norm(_conv(data, count, 1, f"{name}_conv1sc", stride), f"{name}_sc")
        return _relu(way + data, f"{name}_relu3")

    body = mx.sym.identity(mx.sym.Variable("data"), name="id")
    body = _relu(_norm(_conv(body, filters[0], 7, "conv0", 2, 3, no_bias=True), "bn0"), "relu0")
    body = mx.sym.Pooling(body, kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type="max")
    for stage, count in enumerate(units):
        for number in range(count):
            stride = 2 if stage and not number else 1
            body = unit(body, filters[stage + 1], stride, number > 0, f"stage{stage + 1}_unit{number + 1}")
    return _classifier(mx.sym.Pooling(body, global_pool=True, kernel=(7, 7), pool_type="avg", name="pool1"))


def alexnet() -> Any:
    """alexnet.py, with its local response normalisation."""

    def pooled(data: Any) -> Any:
        return mx.sym.Pooling(data, pool_type="max", kernel=(3, 3), stride=(2, 2))

    def normed(data: Any) -> Any:
        return mx.sym.LRN(data, alpha=0.0001, beta=0.75, knorm=2, nsize=5)

    body = pooled(normed(_relu(_conv(mx.sym.Variable("data"), 96, 11, "conv1", 4), "relu1")))
    body = pooled(normed(_relu(_conv(body, 256, 5, "conv2", 1, 2), "relu2")))
    body = _relu(_conv(body, 384, 3, "conv3", 1, 1), "relu3")
    body = _relu(_conv(body, 384, 3, "conv4", 1, 1), "relu4")
    body = pooled(_relu(_conv(body, 256, 3, "conv5", 1, 1), "relu5"))
    for number in (1, 2):
        body = mx.sym.FullyConnected(mx.sym.Flatten(body), name=f"fc{number}", num_hidden=4096)
        body = mx.sym.Dropout(_relu(body, f"relu{number + 5}"), p=0.5)
    return _classifier(body, "fc3")


def vgg(layers: tuple[int, ...], norm: bool) -> Any:
    """vgg.py."""
    body = mx.sym.Variable("data")
    for stage, (count, filters) in enumerate(zip(layers, (64, 128, 256, 512, 512), strict=True), 1):
        for number in range(1, count + 1):
            body = _conv(body, filters, 3, f"conv{stage}_{number}", 1, 1)
            if norm:
                body = mx.sym.BatchNorm(body, name=f"bn{stage}_{number}")
            body = _relu(body, f"relu{stage}_{number}")
        body = mx.sym.Pooling(body, pool_type="max", kernel=(2, 2), stride=(2, 2), name=f"pool{stage}")
    for number in (6, 7):
        body = mx.sym.FullyConnected(mx.sym.flatten(body), num_hidden=4096, name=f"fc{number}")
        body = mx.sym.Dropout(_relu(body, f"relu{number}"), p=0.5, name=f"drop{number}")
    return _classifier(body, "fc8")


def inception_bn() -> Any:
    """inception-bn.py."""

    def factory(data: Any, filters: int, kernel: int, name: str, stride: int = 1, pad: int = 0) -> Any:
        conv = _conv(data, filters, kernel, f"conv_{name}", stride, pad)
        return _relu(_norm(conv, f"bn_{name}", eps=1e-10 + 1e-5), f"relu_{name}")

    def pool(data: Any, kind: str, stride: int, name: str) -> Any:
        square = {"kernel": (3, 3), "stride": (stride, stride), "pad": (1, 1)}
        return mx.sym.Pooling(data, pool_type=kind, name=f"{kind}_pool_{name}_pool", **square)

    def flat(data: Any, sizes: tuple[int, ...], kind: str, name: str) -> Any:
        one, before3, three, before5, five, project = sizes
        ways = [
            factory(data, one, 1, f"{name}_1x1"),
            factory(factory(data, before3, 1, f"{name}_3x3_reduce"), three, 3, f"{name}_3x3", pad=1),
        ]
        way = factory(data, before5, 1, f"{name}_double_3x3_reduce")
        way = factory(way, five, 3, f"{name}_double_3x3_0", pad=1)
        ways.append(factory(way, five, 3, f"{name}_double_3x3_1", pad=1))
        ways.append(factory(pool(data, kind, 1, name), project, 1, f"{name}_proj"))
        return mx.sym.Concat(*ways, name=f"ch_concat_{name}_chconcat")

    def smaller(data: Any, sizes: tuple[int, ...], name: str) -> Any:
        before3, three, before5, five = sizes
        first = factory(factory(data, before3, 1, f"{name}_3x3_reduce"), three, 3, f"{name}_3x3", 2, 1)
        way = factory(data, before5, 1, f"{name}_double_3x3_reduce")
        way = factory(way, five, 3, f"{name}_double_3x3_0", pad=1)
        way = factory(way, five, 3, f"{name}_double_3x3_1", 2, 1)
        return mx.sym.Concat(first, way, pool(data, "max", 2, name), name=f"ch_concat_{name}_chconcat")

    window = {"kernel": (3, 3), "stride": (2, 2), "pool_type": "max"}
    body = mx.sym.Pooling(factory(mx.sym.Variable("data"), 64, 7, "1", 2, 3), name="pool_1", **window)
    body = factory(factory(body, 64, 1, "2_red"), 192, 3, "2", 1, 1)
    body = mx.sym.Pooling(body, name="pool_2", **window)
    body = flat(body, (64, 64, 64, 64, 96, 32), "avg", "3a")
    body = flat(body, (64, 64, 96, 64, 96, 64), "avg", "3b")
    body = smaller(body, (128, 160, 64, 96), "3c")
    body = flat(body, (224, 64, 96, 96, 128, 128), "avg", "4a")
    body = flat(body, (192, 96, 128, 96, 128, 128), "avg", "4b")
    body = flat(body, (160, 128, 160, 128, 160, 128), "avg", "4c")
    body = flat(body, (96, 128, 192, 160, 192, 128), "avg", "4d")
    body = smaller(body, (128, 192, 192, 256), "4e")
    body = flat(body, (352, 192, 320, 160, 224, 128), "avg", "5a")
    body = flat(body, (352, 192, 320, 192, 224, 128), "max", "5b")
    return _classifier(mx.sym.Pooling(body, kernel=(7, 7), stride=(1, 1), name="global_pool", pool_type="avg"))


def inception_v3() -> Any:
    """inception-v3.py."""

    def conv(
        data: Any, filters: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, pad: tuple[int, int] = (0, 0)
    ) -> Any:
        square = {"kernel": kernel, "stride": (stride, stride), "pad": pad, "no_bias": True}
        made = mx.sym.Convolution(data, num_filter=filters, **square)
        return mx.sym.Activation(mx.sym.BatchNorm(made, fix_gamma=True), act_type="relu")

    def pool(data: Any, kind: str, kernel: int, stride: int, pad: int = 0) -> Any:
        square = {"kernel": (kernel, kernel), "stride": (stride, stride), "pad": (pad, pad)}
        return mx.sym.Pooling(data, pool_type=kind, **square)

    def block_a(data: Any, project: int) -> Any:
        five = conv(conv(data, 48), 64, (5, 5), pad=(2, 2))
        three = conv(conv(conv(data, 64), 96, (3, 3), pad=(1, 1)), 96, (3, 3), pad=(1, 1))
        return mx.sym.Concat(conv(data, 64), five, three, conv(pool(data, "avg", 3, 1, 1), project))

    def block_b(data: Any) -> Any:
        three = conv(conv(conv(data, 64), 96, (3, 3), pad=(1, 1)), 96, (3, 3), 2)
        return mx.sym.Concat(conv(data, 384, (3, 3), 2), three, pool(data, "max", 3, 2))

    def block_c(data: Any, inner: int) -> Any:
        seven = conv(conv(conv(data, inner), inner, (1, 7), pad=(0, 3)), 192, (7, 1), pad=(3, 0))
        deep = conv(conv(data, inner), inner, (7, 1), pad=(3, 0))
        deep = conv(conv(deep, inner, (1, 7), pad=(0, 3)), inner, (7, 1), pad=(3, 0))
        deep = conv(deep, 192, (1, 7), pad=(0, 3))
        return mx.sym.Concat(conv(data, 192), seven, deep, conv(pool(data, "avg", 3, 1, 1), 192))

    def block_d(data: Any) -> Any:
        seven = conv(conv(conv(data, 192), 192, (1, 7), pad=(0, 3)), 192, (7, 1), pad=(3, 0))
        return mx.sym.Concat(
            conv(conv(data, 192), 320, (3, 3), 2), conv(seven, 192, (3, 3), 2), pool(data, "max", 3, 2)
        )

    def block_e(data: Any, kind: str) -> Any:
        three, deep = conv(data, 384), conv(conv(data, 448), 384, (3, 3), pad=(1, 1))
        ways = [conv(way, 384, *shape) for way in (three, deep) for shape in (((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0)))]
        return mx.sym.Concat(conv(data, 320), *ways, conv(pool(data, kind, 3, 1, 1), 192))

    body = conv(conv(mx.sym.Variable("data"), 32, (3, 3), 2), 32, (3, 3))
    body = pool(conv(body, 64, (3, 3), pad=(1, 1)), "max", 3, 2)
    body = pool(conv(conv(body, 80), 192, (3, 3)), "max", 3, 2)
    body = block_b(block_a(block_a(block_a(body, 32), 64), 64))
    for inner in (128, 160, 160, 192):
        body = block_c(body, inner)
    body = block_e(block_e(block_d(body), "avg"), "max")
    return _classifier(mx.sym.Pooling(body, kernel=(8, 8), stride=(1, 1), pool_type="avg", name="global_pool"))


def mobilenet_v1() -> Any:
    """mobilenet.py: depthwise and pointwise convolutions in turn."""

    def unit(data: Any, filters: int, name: str, **arguments: Any) -> Any:
        conv = _conv(data, filters, name=f"{name}_conv2d", no_bias=True, **arguments)
        return _relu(mx.sym.BatchNorm(conv, name=f"{name}_batchnorm", fix_gamma=True), f"{name}_relu")

    body = unit(mx.sym.Variable("data"), 32, "conv_1", kernel=3, stride=2, pad=1)
    before = 32
    for number, (after, stride) in enumerate(
        [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)], 2
    ):
        body = unit(body, before, f"conv_{number}_dw", kernel=3, stride=stride, pad=1, num_group=before)
        body = unit(body, after, f"conv_{number}", kernel=1)
        before = after
    return _classifier(mx.sym.Pooling(body, kernel=(7, 7), global_pool=True, pool_type="avg", name="global_pool"))


def mobilenet_v2() -> Any:
    """mobilenetv2.py: inverted residuals, with a clip as the activation."""

    def unit(data: Any, filters: int, name: str, active: bool = True, **arguments: Any) -> Any:
        conv = _norm(_conv(data, filters, name=f"{name}_conv", no_bias=True, **arguments), f"{name}_bn", eps=1e-5)
        return mx.sym.clip(conv, 0, 6, name=f"{name}_relu6") if active else conv

    body = unit(mx.sym.Variable("data"), 32, "first-3x3", kernel=3, stride=2, pad=1)
    before = 32
    settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for stage, (growth, after, count, stride) in enumerate(settings):
        for number in range(count):
            name, inner = f"seq-{stage}-block{number}", before * growth
            way = unit(body, inner, f"{name}-exp", kernel=1)
            step = 1 if number else stride
            way = unit(way, inner, f"{name}-depthwise", kernel=3, stride=step, pad=1, num_group=inner)
            way = unit(way, after, f"{name}-linear", active=False, kernel=1)
            body = mx.sym.elemwise_add(body, way) if number else way
            before = after
    body = unit(body, 1280, "last-1x1", kernel=1)
    return _classifier(mx.sym.Pooling(body, kernel=(7, 7), global_pool=True, pool_type="avg", name="global_pool"))


def densenet(layers: tuple[int, ...], growth: int, reduction: float) -> Any:
    """Pre-activated bottlenecks, each joined to what it was given."""
    body = _conv(mx.sym.Variable("data"), 2 * growth, 7, "conv0", 2, 3, no_bias=True)
    body = _relu(_norm(body, "bn0"), "relu0")
    body = mx.sym.Pooling(body, kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type="max", name="pool0")
    channels = 2 * growth
    for stage, count in enumerate(layers, 1):
        for number in range(1, count + 1):
            name = f"DBstage{stage}_unit{number}"
            way = _relu(_norm(body, f"{name}_bn1"), f"{name}_relu1")
            way = _conv(way, 4 * growth, 1, f"{name}_conv1", no_bias=True)
            way = _relu(_norm(way, f"{name}_bn2"), f"{name}_relu2")
            way = mx.sym.Dropout(_conv(way, growth, 3, f"{name}_conv2", 1, 1, no_bias=True), p=0.2)
            body = mx.sym.Concat(body, way, name=f"{name}_concat0")
        channels += count * growth
        if stage < len(layers):
            channels = int(channels * reduction)
            way = _relu(_norm(body, f"TBstage{stage}_bn1"), f"TBstage{stage}_relu1")
            way = _conv(way, channels, 1, f"TBstage{stage}_conv1", no_bias=True)
            body = mx.sym.Pooling(way, kernel=(2, 2), stride=(2, 2), pool_type="avg", name=f"TBstage{stage}_pool1")
    body = _relu(_norm(body, "bn1"), "relu1")
    return _classifier(mx.sym.Pooling(body, global_pool=True, kernel=(7, 7), pool_type="avg", name="pool1"))


def squeezenet() -> Any:
    """SqueezeNet 1.0: pooled in Caffe's way, and classified by a convolution."""

    def fire(data: Any, squeezed: int, expanded: int, name: str) -> Any:
        inner = _relu(_conv(data, squeezed, 1, f"{name}_squeeze1x1"), f"{name}_relu_squeeze1x1")
        ways = [_conv(inner, expanded, side, f"{name}_expand{side}x{side}", 1, side // 2) for side in (1, 3)]
        ways = [_relu(way, f"{name}_relu_{number}") for number, way in enumerate(ways)]
        return mx.sym.Concat(*ways, name=f"{name}_concat")

    def pool(data: Any, name: str) -> Any:
        window = {"kernel": (3, 3), "stride": (2, 2), "pooling_convention": "full"}
        return mx.sym.Pooling(data, pool_type="max", name=name, **window)

    body = pool(_relu(_conv(mx.sym.Variable("data"), 96, 7, "conv1", 2), "relu_conv1"), "pool1")
    for number, squeezed in enumerate((16, 16, 32, 32, 48, 48, 64, 64), 2):
        body = fire(body, squeezed, 4 * squeezed, f"fire{number}")
        if number in (4, 8):
            body = pool(body, f"pool{number}")
    body = _relu(_conv(mx.sym.Dropout(body, p=0.5, name="drop9"), CLASSES, 1, "conv10"), "relu_conv10")
    body = mx.sym.Pooling(body, global_pool=True, kernel=(13, 13), pool_type="avg", name="pool10")
    return mx.sym.SoftmaxOutput(mx.sym.Flatten(body, name="flatten"), name="softmax")


def ssd_vgg16() -> Any:
    """vgg16_reduced.py and common.py of example/ssd, for deployment."""
    body, sources = mx.sym.Variable("data"), []
    for stage, (count, filters) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), 1):
        for number in range(1, count + 1):
            body = _relu(_conv(body, filters, 3, f"conv{stage}_{number}", 1, 1), f"relu{stage}_{number}")
        if stage == 4:
            even = mx.sym.L2Normalization(body, mode="channel", name="layer_0_norm")
            sources.append(mx.sym.broadcast_mul(mx.sym.Variable("layer_0_scale", shape=(1, 512, 1, 1)), even))
        last = (
            {"kernel": (3, 3), "stride": (1, 1), "pad": (1, 1)} if stage == 5 else {"kernel": (2, 2), "stride": (2, 2)}
        )
        full = {"pooling_convention": "full"} if stage == 3 else {}
        body = mx.sym.Pooling(body, pool_type="max", name=f"pool{stage}", **last, **full)
    body = mx.sym.Convolution(body, kernel=(3, 3), pad=(6, 6), dilate=(6, 6), num_filter=1024, name="fc6")
    body = _relu(_conv(_relu(body, "relu6"), 1024, 1, "fc7"), "relu7")
    sources.append(body)
    for number, filters in enumerate((512, 256), 8):
        body = _relu(_conv(body, filters // 2, 1, f"multi_feat_{number}_conv_1x1"), f"relu{number}_1")
        body = _relu(_conv(body, filters, 3, f"multi_feat_{number}_conv_3x3", 2, 1), f"relu{number}_2")
        sources.append(body)
    sizes, ratios = ((0.1, 0.141), (0.2, 0.272), (0.37, 0.447), (0.54, 0.619)), (1, 2, 0.5)
    classes: list[Any] = []
    places: list[Any] = []
    anchors: list[Any] = []
    for index, source in enumerate(sources):
        name = f"layer_{index}"
        count = len(sizes[index]) - 1 + len(ratios)
        for outputs, head, filters in ((places, "loc", 4), (classes, "cls", CLASSES + 1)):
            made = _conv(source, count * filters, 3, f"{name}_{head}_pred_conv", 1, 1)
            outputs.append(mx.sym.Flatten(mx.sym.transpose(made, axes=(0, 2, 3, 1))))
        prior = mx.sym.contrib.MultiBoxPrior(source, sizes=sizes[index], ratios=ratios, name=f"{name}_anchors")
        anchors.append(mx.sym.Flatten(prior))
    scores = mx.sym.Reshape(mx.sym.Concat(*classes, dim=1), shape=(0, -1, CLASSES + 1))
    scores = mx.sym.transpose(scores, axes=(0, 2, 1), name="multibox_cls_pred")
    return mx.sym.contrib.MultiBoxDetection(
        mx.sym.SoftmaxActivation(scores, mode="channel", name="cls_prob"),
        mx.sym.Concat(*places, dim=1, name="multibox_loc_pred"),
        mx.sym.Reshape(mx.sym.Concat(*anchors, dim=1), shape=(0, -1, 4), name="multibox_anchors"),
        name="detection",
        nms_threshold=0.45,
        variances=(0.1, 0.1, 0.2, 0.2),
        nms_topk=400,
    )


WIDE = (64, 256, 512, 1024, 2048)
# Of each: its builder, and the sides of the images that it takes here.
SYMBOLS: dict[str, tuple[Callable[[], Any], int]] = {
    "resnet-18": (lambda: resnet_v2((2, 2, 2, 2), (64, 64, 128, 256, 512), bottleneck=False), 96),
    "resnet-50": (lambda: resnet_v2((3, 4, 6, 3), WIDE, bottleneck=True), 96),
    "resnet-50-v1": (lambda: resnet_v1((3, 4, 6, 3), WIDE), 96),
    "resnet-152": (lambda: resnet_v2((3, 8, 36, 3), WIDE, bottleneck=True), 64),
    "alexnet": (alexnet, 224),
    "vgg-11": (lambda: vgg((1, 1, 2, 2, 2), norm=False), 64),
    "vgg-16-bn": (lambda: vgg((2, 2, 3, 3, 3), norm=True), 64),
    "inception-bn": (inception_bn, 224),
    "inception-v3": (inception_v3, 299),
    "mobilenet": (mobilenet_v1, 96),
    "mobilenetv2": (mobilenet_v2, 96),
    "densenet-121": (lambda: densenet((6, 12, 24, 16), 32, 0.5), 96),
    "squeezenet": (squeezenet, 96),
    "ssd-vgg16": (ssd_vgg16, 96),
}
