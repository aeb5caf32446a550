"""Golden vectors that we don't agree with, and why. docs/differences.md tells the same to users."""

MINIMUM = "scaling_min_val bounds the statistic in training and evaluation alike, not the scale in evaluation"
BINARY_CLIP = (
    "a binary weight quantizer leaves the float weight alone; the reference clips it in place"
)
NEGATIVE = (
    "a range that is negative throughout gets a scale that reaches 0, so that its zero point fits"
)
WIDENS = "-(-128) is 128 and |-128| is 128: the result needs the wider type"

SEARCHED = (
    "a zero point of activations is searched for at the batch's own scale, and the other way round; what the "
    "reference tries depends on how far the collection is"
)

SHARED_EXPONENT = "a group of zeros shares a power of two too, as every other group"

SUMS = "the zero points of a window add up as its integers do, so that these stay unsigned"

STATES = "cell states come back as floats unless quantized results are asked for, those of lower layers too"

DIFFERENCES = {
    "rnn/QuantLSTM/unshared_cell": STATES,
    "convtranspose/2d/s2p1op1/SignedBinaryWeightPerTensorConst/train": BINARY_CLIP,
    "pool/TruncAvgPool2d/zero_point": SUMS,
    "hqo/ShiftedUint8WeightPerGroupFloatHQO/g3": NEGATIVE + " (one group is)",
    "minifloat/edge/Fp8e4m3OCPActPerTensorFloat/zeros": MINIMUM,
    "mx/MXInt8Act/edge/zeros": SHARED_EXPONENT,
    "hqo/ShiftedUint8ActPerTensorFloatHQO/train": SEARCHED,
    "mse/ShiftedUint8ActPerTensorFloatMSE/eval": SEARCHED,
    "act/edge/Int8ActPerTensorFloat/zeros": MINIMUM,
    "act/edge/Uint8ActPerTensorFloat/zeros": MINIMUM,
    "act/edge/ShiftedUint8ActPerTensorFloat/zeros": MINIMUM,
    "act/override/min_val=5": MINIMUM,
    "linear/edge_inputs/zeros": MINIMUM,
    "linear/SignedBinaryWeightPerTensorConst/eval": BINARY_CLIP,
    "linear/edge_weights/SignedBinaryWeightPerTensorConst/neg": BINARY_CLIP
    + "; and a binary tensor that holds one of its two values is valid",
    "conv2d/k3s2p1/SignedBinaryWeightPerTensorConst": BINARY_CLIP,
    "net/binary/train": BINARY_CLIP,
    "linear/edge_weights/ShiftedUint8WeightPerChannelFloat/neg": NEGATIVE,
    "io/in_w/Int8ActPerTensorFloat/ShiftedUint8WeightPerChannelFloat": NEGATIVE
    + " (one channel is)",
    "bias/QuantConv2d/Int8Bias/per_channel_weight/eval": "a bias on the scale of the accumulator, channel by "
    "channel, leaves the zero point 0",
    "qt/neg/signed": WIDENS,
    "qt/abs/signed": WIDENS,
    "qt/torch/t.sum": "a sum of integers on one scale is an integer on that scale",
    "qt/abs/zp": "unsigned integers with a zero point can be negative values: |x| isn't x",
    "state_dict/act/then_train": "a collection that was saved half way goes on after loading",
    "error/strict_load_missing_scale": "a float checkpoint loads with strict=True; the scale starts from its weights",
}
