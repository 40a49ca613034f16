"""The study of attention's forward kernel with head dim 256, whose sums fill half of the registers."""

from flashmoe_train.bench.variants.attention_forward import NOT_TRUSTING, sizes, study

STUDY = study(
    256,
    {
        "now": (),
        "not_trusting": NOT_TRUSTING,
        "keys_80": sizes("256, 256, 128, 64", "256, 256, 128, 80"),
        "keys_80_not_trusting": (*sizes("256, 256, 128, 64", "256, 256, 128, 80"), *NOT_TRUSTING),
    },
)
