"""The study of attention's forward kernel with head dims 192 and 128, DeepSeek's latent attention."""

from flashmoe_train.bench.variants.attention_forward import constant, sizes, study

_TRUSTING = constant("TRUSTING", "AHEAD", "true")
_AHEAD = constant("AHEAD", "WIDTH <= 128", "true")

STUDY = study(
    192,
    {
        "now": (),
        "keys_112": sizes("192, 128, 128, 128", "192, 128, 128, 112"),
        "keys_112_trusting": (*sizes("192, 128, 128, 128", "192, 128, 128, 112"), *_TRUSTING),
        "keys_96_trusting": (*sizes("192, 128, 128, 128", "192, 128, 128, 96"), *_TRUSTING),
        "keys_96_ahead": (*sizes("192, 128, 128, 128", "192, 128, 128, 96"), *_AHEAD),
        "trusting": _TRUSTING,
    },
    dv=128,
)
