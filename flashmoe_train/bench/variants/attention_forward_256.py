"""The study of attention's forward kernel with head dim 256, whose sums fill half of the registers."""

from flashmoe_train.bench.variants.attention_forward import constant, sizes, study

_TRUSTING = constant("TRUSTING", "AHEAD", "true")

STUDY = study(
    256,
    {
        "now": (),
        "trusting": _TRUSTING,
        "keys_64": sizes("256, 256, 128, 80", "256, 256, 128, 64"),
        "keys_64_trusting": (*sizes("256, 256, 128, 80", "256, 256, 128, 64"), *_TRUSTING),
    },
)
