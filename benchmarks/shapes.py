"""Shapes of models: the sizes in their `params.json`."""

from typing import Any

_LLAMA_3_1 = {
    **{"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}
}
LLAMA_3_1: dict[str, dict[str, Any]] = {
    "8B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, **_LLAMA_3_1},
    "70B": {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, **_LLAMA_3_1},
    "405B": {
        **{"dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2},
        **_LLAMA_3_1,
    },
}
SMOLLM2_135M: dict[str, Any] = {
    **{"dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 49412, "multiple_of": 256},
    **{"ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 100000.0},
}
TINY: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 32}
BY_NAME = {"8B": LLAMA_3_1["8B"], "SMOLLM2_135M": SMOLLM2_135M, "tiny": TINY}  # those that are measured
