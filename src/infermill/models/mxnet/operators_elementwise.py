"""Operators that take each number by itself, and those that take two tensors number by number."""

import math

import numpy as np

from infermill.models.mxnet.graph import Step, Tensor, Translate

# LeakyReLU's SELU has these (src/operator/mshadow_op.h), as ONNX's default has.
_SELU = {"alpha": 1.6732632423543772, "gamma": 1.0507009873554805}
_ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "softrelu": "Softplus", "softsign": "Softsign", "tanh": "Tanh"}

_UNARY = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "softsign": "Softsign",
    "erf": "Erf",
    "abs": "Abs",
    "sign": "Sign",
    "ceil": "Ceil",
    "floor": "Floor",
    "negative": "Neg",
    "reciprocal": "Reciprocal",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "sin": "Sin",
    "cos": "Cos",
    "arctan": "Atan",
}


def unchanged(step: Step) -> Tensor:
    """What has no effect at inference: dropout, losses, stopped gradients."""
    return step.data


def loss(step: Step) -> dict[str, Tensor]:
    return {"loss": step.data}


def dropout(step: Step) -> Tensor:
    if step.attributes.choice("mode", ("training", "always"), "training") == "always":
        raise step.refused("its mode is `always`, whose answers are random")
    return step.data


def _unary(op: str) -> Translate:
    return lambda step: step.add(op, step.data)


def activation(step: Step) -> Tensor:
    return step.add(_ACTIVATIONS[step.attributes.choice("act_type", tuple(_ACTIVATIONS))], step.data)


def leaky_relu(step: Step) -> Tensor:
    attributes, data = step.attributes, step.data
    kind = attributes.choice("act_type", ("leaky", "prelu", "elu", "selu", "gelu", "rrelu"), "leaky")
    if kind == "selu":
        return step.add("Selu", data, **_SELU)
    if kind == "gelu":
        tail = step.add("Erf", step.add("Mul", data, step.number(math.sqrt(0.5))))
        weight = step.add("Mul", step.add("Add", tail, step.number(1)), step.number(0.5))
        return step.add("Mul", data, weight)
    if kind == "prelu":
        slope = step.like_data(step.input(1))
        if slope.rank == 1 and data.rank > 2:
            slope = step.reshape(slope, [-1, *(1 for _ in range(data.rank - 2))])
        return step.add("PRelu", data, slope)
    if kind == "rrelu":
        alpha = (attributes.number("lower_bound", 0.125) + attributes.number("upper_bound", 0.334)) / 2
    else:
        alpha = attributes.number("slope", 0.25)
    return step.add("Elu" if kind == "elu" else "LeakyRelu", data, alpha=alpha)


def hard_sigmoid(step: Step) -> Tensor:
    alpha, beta = step.attributes.number("alpha", 0.2), step.attributes.number("beta", 0.5)
    # OpenVINO takes a beta of 0 in ONNX's HardSigmoid for 0.5.
    line = step.add("Add", step.add("Mul", step.data, step.number(alpha)), step.number(beta))
    return step.add("Clip", line, step.number(0), step.number(1))


def clip(step: Step) -> Tensor:
    low, high = step.attributes.number("a_min"), step.attributes.number("a_max")
    return step.add("Clip", step.data, step.number(low), step.number(high))


def cast(step: Step) -> Tensor:
    names = ("float16", "float32", "float64", "uint8", "int8", "int32", "int64", "bool")
    return step.cast(step.data, step.attributes.choice("dtype", names))


def rsqrt(step: Step) -> Tensor:
    return step.add("Reciprocal", step.add("Sqrt", step.data))


def square(step: Step) -> Tensor:
    return step.add("Mul", step.data, step.data)


def sum_of_all(step: Step) -> Tensor:
    return step.add("Sum", *step.inputs)


def where(step: Step) -> Tensor:
    if step.data.shape != step.input(1).shape:
        raise step.refused("its condition has another shape than its values")
    return step.add("Where", step.cast(step.data, np.bool_), step.input(1), step.input(2))


def _operands(step: Step) -> tuple[Tensor, Tensor]:
    left, right = step.data, step.input(1)
    return (left, step.like_data(right, left)) if left.value is None else (step.like_data(left, right), right)


def _binary(op: str) -> Translate:
    return lambda step: step.add(op, *_operands(step))


def _comparison(op: str, *, negated: bool = False) -> Translate:
    def translate(step: Step) -> Tensor:
        return _as_numbers(step, op, *_operands(step), negated=negated)

    return translate


def _as_numbers(step: Step, op: str, left: Tensor, right: Tensor, *, negated: bool) -> Tensor:
    """MXNet's comparisons are 0 and 1 in the type of what is compared."""
    answer = step.add(op, left, right)
    return step.cast(step.add("Not", answer) if negated else answer, left.dtype)


def _scalar(op: str, *, reverse: bool = False) -> Translate:
    def translate(step: Step) -> Tensor:
        number = step.number(step.attributes.number("scalar"))
        return step.add(op, number, step.data) if reverse else step.add(op, step.data, number)

    return translate


def _scalar_comparison(op: str, *, negated: bool = False) -> Translate:
    def translate(step: Step) -> Tensor:
        number = step.number(step.attributes.number("scalar"))
        return _as_numbers(step, op, step.data, number, negated=negated)

    return translate


def _named(translate: Translate, *names: str) -> dict[str, Translate]:
    return dict.fromkeys(names, translate)


ELEMENTWISE: dict[str, Translate] = {
    "Activation": activation,
    "LeakyReLU": leaky_relu,
    "Dropout": dropout,
    "hard_sigmoid": hard_sigmoid,
    "clip": clip,
    "where": where,
    "square": square,
    "rsqrt": rsqrt,
    "make_loss": loss,
    **_named(cast, "Cast", "cast", "amp_cast"),
    **_named(sum_of_all, "add_n", "ElementWiseSum", "_sum"),
    **_named(
        unchanged,
        *("identity", "_copy", "BlockGrad", "stop_gradient", "MakeLoss", "IdentityAttachKLSparseReg"),
        *("LinearRegressionOutput", "MAERegressionOutput", "SVMOutput", "_identity_with_attr_like_rhs"),
    ),
    **_named(_unary("Sigmoid"), "LogisticRegressionOutput"),
    **{name: _unary(op) for name, op in _UNARY.items()},
    **_named(_binary("Add"), "elemwise_add", "_add", "_plus", "_Plus", "_grad_add", "broadcast_add", "broadcast_plus"),
    **_named(_binary("Sub"), "elemwise_sub", "_sub", "_minus", "_Minus", "broadcast_sub", "broadcast_minus"),
    **_named(_binary("Mul"), "elemwise_mul", "_mul", "_Mul", "broadcast_mul"),
    **_named(_binary("Div"), "elemwise_div", "_div", "_Div", "broadcast_div"),
    **_named(_binary("Pow"), "_power", "_Power", "broadcast_power"),
    **_named(_binary("Max"), "_maximum", "_Maximum", "broadcast_maximum"),
    **_named(_binary("Min"), "_minimum", "_Minimum", "broadcast_minimum"),
    **_named(_comparison("Equal"), "_equal", "_Equal", "broadcast_equal"),
    **_named(_comparison("Equal", negated=True), "_not_equal", "_Not_Equal", "broadcast_not_equal"),
    **_named(_comparison("Greater"), "_greater", "_Greater", "broadcast_greater"),
    **_named(_comparison("GreaterOrEqual"), "_greater_equal", "_Greater_Equal", "broadcast_greater_equal"),
    **_named(_comparison("Less"), "_lesser", "_Lesser", "broadcast_lesser"),
    **_named(_comparison("LessOrEqual"), "_lesser_equal", "_Lesser_Equal", "broadcast_lesser_equal"),
    **_named(_scalar("Add"), "_plus_scalar", "_PlusScalar"),
    **_named(_scalar("Sub"), "_minus_scalar", "_MinusScalar"),
    **_named(_scalar("Sub", reverse=True), "_rminus_scalar", "_RMinusScalar"),
    **_named(_scalar("Mul"), "_mul_scalar", "_MulScalar"),
    **_named(_scalar("Div"), "_div_scalar", "_DivScalar"),
    **_named(_scalar("Div", reverse=True), "_rdiv_scalar", "_RDivScalar"),
    **_named(_scalar("Pow"), "_power_scalar", "_PowerScalar"),
    **_named(_scalar("Pow", reverse=True), "_rpower_scalar", "_RPowerScalar"),
    **_named(_scalar("Max"), "_maximum_scalar", "_MaximumScalar"),
    **_named(_scalar("Min"), "_minimum_scalar", "_MinimumScalar"),
    **_named(_scalar_comparison("Equal"), "_equal_scalar", "_EqualScalar"),
    **_named(_scalar_comparison("Equal", negated=True), "_not_equal_scalar", "_NotEqualScalar"),
    **_named(_scalar_comparison("Greater"), "_greater_scalar", "_GreaterScalar"),
    **_named(_scalar_comparison("GreaterOrEqual"), "_greater_equal_scalar", "_GreaterEqualScalar"),
    **_named(_scalar_comparison("Less"), "_lesser_scalar", "_LesserScalar"),
    **_named(_scalar_comparison("LessOrEqual"), "_lesser_equal_scalar", "_LesserEqualScalar"),
}
