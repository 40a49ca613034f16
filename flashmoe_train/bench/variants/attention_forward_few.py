"""The study of attention's forward kernel where there are few queries: not a tile for every multiprocessor."""

from dataclasses import replace

from flashmoe_train.bench.attention_cases import Case
from flashmoe_train.bench.variants.attention_forward import study

STUDY = replace(
    study(
        64,
        {
            "now": (),
            "large_tiles": (("SMALLEST_TILE) <= most_blocks", "SMALLEST_TILE) <= 0"),),
            "keys_64": (("Sizes<T, D, V, SMALLEST_TILE, STEP>>", "Sizes<T, D, V, SMALLEST_TILE, 64>>"),),
        },
    ),
    cases=[Case(b=1, s=s, h=8, h_kv=8, d=64, dv=64, causal=causal) for causal in (False, True) for s in (512, 1024)],
)
