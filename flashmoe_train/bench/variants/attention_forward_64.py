"""The study of attention's forward kernel with head dim 64, where the exponentials take as long as the products."""

from flashmoe_train.bench.variants.attention_forward import (
    EARLY_TURNS,
    NO_TURNS,
    NOT_AHEAD,
    NOT_TRUSTING,
    NOTHING_SKIPPED,
    constant,
    sizes,
    study,
)

STUDY = study(
    64,
    {
        "now": (),
        "early_turns": EARLY_TURNS,
        "no_turns": NO_TURNS,
        "not_trusting": NOT_TRUSTING,
        "not_ahead": NOT_AHEAD,
        "nothing_skipped": NOTHING_SKIPPED,
        "stages_3": constant("STAGES", "2; ", "3; "),
        "two_consumers": sizes("64, 64, 192, 128", "64, 64, 128, 128"),
    },
)
