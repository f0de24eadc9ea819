"""The operators of MXNet that have a translation, by the names that symbols use."""

from infermill.models.mxnet.graph import Translate
from infermill.models.mxnet.operators_detection import DETECTION
from infermill.models.mxnet.operators_elementwise import ELEMENTWISE
from infermill.models.mxnet.operators_layers import LAYERS
from infermill.models.mxnet.operators_pooling import POOLING
from infermill.models.mxnet.operators_reductions import REDUCTIONS
from infermill.models.mxnet.operators_shape import SHAPE

OPERATORS: dict[str, Translate] = {**LAYERS, **POOLING, **ELEMENTWISE, **SHAPE, **REDUCTIONS, **DETECTION}
