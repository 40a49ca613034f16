"""The study of attention's forward kernel with head dim 64, where the exponentials take as long as the products."""

from flashmoe_train.bench.variants.attention_forward import (
    NOT_AHEAD,
    PASS_AFTER_SCORES,
    PASS_AFTER_VALUES,
    RESCALE_ASKED,
    constant,
    polynomial,
    sizes,
    study,
    turns,
)

STUDY = study(
    64,
    {
        "now": (),
        "no_turns": turns(False),
        "turns_scores": PASS_AFTER_SCORES,
        "turns_values": PASS_AFTER_VALUES,
        "not_ahead": NOT_AHEAD,
        "stages_3": constant("STAGES", "2; ", "3; "),
        "stages_4": constant("STAGES", "2; ", "4; "),
        "rescale_asked": RESCALE_ASKED,
        "keys_96": sizes(64, (192, 128), (192, 96)),
        "two_consumers": sizes(64, (192, 128), (128, 128)),
        "two_consumers_scores": (*sizes(64, (192, 128), (128, 128)), *turns(True), *PASS_AFTER_SCORES),
    },
)
