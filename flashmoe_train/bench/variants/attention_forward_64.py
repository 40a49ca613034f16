"""The study of attention's forward kernel with head dim 64, where the exponentials take as long as the products."""

from flashmoe_train.bench.variants.attention_forward import TURNS, polynomial, sizes, stages, study

STUDY = study(
    64,
    {
        "now": (),
        "turns": TURNS,
        "stages_3": stages(3),
        "stages_4": stages(4),
        "polynomial_1": polynomial(1),
        "polynomial_2": polynomial(2),
        "polynomial_3": polynomial(3),
        "two_consumers": sizes(64, (192, 128), (128, 128)),
        "two_consumers_192": sizes(64, (192, 128), (128, 192)),
        "two_consumers_192_polynomial_2": (*sizes(64, (192, 128), (128, 192)), *polynomial(2)),
        "turns_polynomial_2": (*TURNS, *polynomial(2)),
    },
)
