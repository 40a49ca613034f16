"""The study of attention's forward kernel with head dims 192 and 128, DeepSeek's latent attention."""

from flashmoe_train.bench.variants.attention_forward import NOT_TRUSTING, constant, sizes, study

STUDY = study(
    192,
    {
        "now": (),
        "not_trusting": NOT_TRUSTING,
        "keys_112": sizes("192, 128, 128, 128", "192, 128, 128, 112"),
        "keys_96_ahead": (
            *sizes("192, 128, 128, 128", "192, 128, 128, 96"),
            *constant("AHEAD", "WIDTH <= 128", "true"),
        ),
    },
    dv=128,
)
