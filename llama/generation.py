"""Building a model with its adapter, and generating from it: token ids in, token ids out."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from llama.checkpoint import load_base, read_base
from llama.derivations import Derivations
from llama.distributed import get_device, init_distributed
from llama.engine import Request, SamplingParams, run
from llama.machine import MIN_TEMPERATURE
from llama.model import Transformer
from llama.sampling import seeded_uniforms
from llama.tokenizer import Tokenizer
from moa import state
from moa.adapter_file import load_adapter
from moa.config import AdapterConfig


class Llama:
    """A model, its tokenizer, and the sizes up to which it generates; cuda_graphs: by recorded decode steps
    (`llama.graphs`), unless a module has a hook."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        max_seq_len: int,
        max_batch_size: int,
        cuda_graphs: bool = False,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_len, self.max_batch_size, self.cuda_graphs = max_seq_len, max_batch_size, cuda_graphs
        self._derivations = Derivations(model)

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path,
        adapter_path: str | Path | None = None,
        *,
        config: AdapterConfig | None = None,
        method: str | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 32,
        bf16: bool = False,
        device: str = "cpu",
        seed: int = 0,
        model_parallel_size: int = 1,
        flash_attention2: bool = False,
        cuda_graphs: bool = False,
    ) -> "Llama":
        """Load a base, and beside it an adapter from a file, or fresh ones by a configuration (`config`; started from
        `seed`), or none. The base does not train; adapters are float32 whatever the base's type.

        method: which method an adapter in the authors' format is, where its flags do not tell. Raises ValueError
        naming the file, tensor or setting that is wrong.
        """
        for name, size in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if flash_attention2:
            require_flash(device, bf16)
        torch_device = get_device(device)
        if cuda_graphs:
            require_graphs(torch_device, model_parallel_size)
        args, tokenizer = read_base(ckpt_dir)
        adapter = None
        if adapter_path is not None:
            assert config is None, "an adapter file brings its own configuration"
            config, adapter = load_adapter(adapter_path, asdict(args), method)
        init_distributed(torch_device, model_parallel_size)
        model = Transformer(args, config, flash_attention2)
        load_base(model, ckpt_dir, torch.bfloat16 if bf16 else torch.float32, torch_device)
        if adapter is not None:
            state.load_adapter_state_dict(model, adapter, str(adapter_path))
        else:
            state.reset_adapters(model, seed)
        state.freeze_base(model)
        model.eval()
        return cls(model, tokenizer, max_seq_len, max_batch_size, cuda_graphs)

    def generate(
        self,
        prompts: list[list[int]],
        max_gen_len: int,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        samples: list[int] | None = None,
        on_finish: Callable[[int, list[int]], None] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt (token ids, BOS included) by up to `max_gen_len` tokens, to the model's end token,
        which is left out. Results are in the prompts' order.

        A row also ends where prompt and answer fill `max_seq_len`. Up to `max_batch_size` rows run at once; a row that
        ends makes room for the next at once. A row's result depends on its prompt, `seed` and its sample number alone.

        min_new_tokens: the end token is not chosen before this many. temperature 0: greedy. samples: number of each
        row's sample (default 0), for several draws from one prompt. on_finish(index, tokens): called as rows finish.
        Raises ValueError for an empty prompt, one without room for an answer, or settings out of range.
        """
        self._check(prompts, max_gen_len, min_new_tokens, temperature, top_p)
        if not prompts:
            return []
        samples = samples or [0] * len(prompts)
        limits = [min(max_gen_len, self.max_seq_len - len(prompt)) for prompt in prompts]
        draws = [
            seeded_uniforms(prompt, seed, sample, limit).tolist() if temperature > 0 else []
            for prompt, sample, limit in zip(prompts, samples, limits, strict=True)
        ]
        answers = [Request(i, *row) for i, row in enumerate(zip(prompts, limits, draws, strict=True))]
        rules = SamplingParams(self.tokenizer.stop_ids, min_new_tokens, temperature, top_p)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())
        graphs = self.cuda_graphs and not hooked
        behind = 0 if hooked else _steps_behind(self.model.output.weight.device)  # hooks see no step in vain
        training = self.model.training
        self.model.eval()  # no noise in a router
        try:
            with self._derivations.of_run(max(limits), ahead=not hooked):
                for answer in run(self.model, answers, self.max_batch_size, rules, graphs, behind):
                    if on_finish is not None:
                        on_finish(answer.index, answer.tokens)
        finally:
            self.model.train(training)
        return [answer.tokens for answer in answers]

    def _check(self, prompts, max_gen_len, min_new_tokens, temperature, top_p) -> None:
        if max_gen_len < 1:
            raise ValueError(f"max_gen_len must be at least 1, not {max_gen_len}")
        if not 0 <= min_new_tokens <= max_gen_len:
            raise ValueError(f"min_new_tokens must be 0 to max_gen_len ({max_gen_len}), not {min_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, and finite, not {temperature}")
        if 0 < temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, not {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty")
            if len(prompt) >= self.max_seq_len:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens: no room for an answer within {self.max_seq_len}"
                )
            if min(prompt) < 0 or max(prompt) >= self.tokenizer.n_words:
                raise ValueError(f"prompt {i} has a token that is none of the tokenizer's {self.tokenizer.n_words}")


def _steps_behind(device: torch.device) -> int:
    """Of `llama.engine.run`. A CPU would do the steps in vain itself, and wait for nothing."""
    return 1 if device.type == "cuda" else 0


def require_flash(device: str, bf16: bool) -> None:
    """ValueError unless flash-attn 2 can be used as asked."""
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        raise ValueError("flash_attention2: the package flash-attn is not installed (it needs a GPU)") from None
    if device == "cpu" or not torch.cuda.is_available():
        raise ValueError("flash_attention2 needs a GPU")
    if not bf16:
        raise ValueError("flash_attention2 needs bf16")


def require_graphs(device: torch.device, model_parallel_size: int) -> None:
    """ValueError unless decode steps can be recorded there."""
    if device.type != "cuda":
        raise ValueError("cuda_graphs needs a GPU")
    if model_parallel_size > 1:
        raise ValueError(f"cuda_graphs needs model_parallel_size 1, not {model_parallel_size}")
