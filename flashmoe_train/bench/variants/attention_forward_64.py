"""The study of attention's forward kernel with head dim 64, where the exponentials take as long as the products."""

from flashmoe_train.bench.variants.attention_forward import (
    ALWAYS_RAISED,
    NO_TURNS,
    constant,
    late_turns,
    polynomial,
    sizes,
    study,
)

STUDY = study(
    64,
    {
        "now": (),
        "no_turns": NO_TURNS,
        "late_turns": late_turns(True),
        "always_raised": ALWAYS_RAISED,
        "polynomial_1": polynomial(1),
        "stages_3": constant("STAGES", "2; ", "3; "),
        "two_consumers": sizes(64, (192, 128), (128, 128)),
        "two_consumers_176": sizes(64, (192, 128), (128, 176)),
        "two_consumers_192": sizes(64, (192, 128), (128, 192)),
    },
)
