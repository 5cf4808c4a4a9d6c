"""`Llama`: a model with its adapter and tokenizer. Token ids in, token ids out."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from llama.accelerate import FastDecoding
from llama.checkpoint import load_base_weights, load_params_and_tokenizer
from llama.distributed import get_device, init_distributed
from llama.engine import Request, SamplingParams, decode, generate, seeded_uniforms
from llama.machine import check_machine, check_sampling
from llama.model import Transformer
from llama.quantize import require_quantization
from llama.tokenizer import Tokenizer
from moa import state
from moa.adapter_file import load_adapter
from moa.config import AdapterConfig


class Llama:
    """A model, its tokenizer, and the sizes up to which it generates.

    fast_decoding: decode steps by `llama.accelerate`; None: by the plain formulas.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        max_seq_len: int,
        max_batch_size: int,
        fast_decoding: FastDecoding | None = None,
    ):
        self.model, self.tokenizer, self.fast_decoding = model, tokenizer, fast_decoding
        self.max_seq_len, self.max_batch_size = max_seq_len, max_batch_size
        self.async_lag = 1 if model.output.weight.is_cuda else 0  # of `llama.engine.generate`

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
        compile: bool = False,
        accelerate: bool = True,
        quantize: str | None = None,
    ) -> "Llama":
        """Load a base, with an adapter from a file, or with fresh ones of a configuration (started from `seed`), or
        alone. The base does not train; adapters are float32 whatever the type of the base.

        method: of an adapter in the reference format, where its flags do not tell. accelerate: False runs the plain
        formulas. compile: on a CPU, decode steps of one sequence are compiled (`llama.accelerate.compile`).
        quantize: "nf4" holds the matrices of the blocks in 4 bits. Raises ValueError naming the file, tensor
        or setting that is wrong.
        """
        for name, size in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        torch_device = get_device(device)
        check_machine(torch_device.type, bf16, flash_attention2, cuda_graphs, model_parallel_size, compile)
        if quantize:
            require_quantization(model_parallel_size)
        args, tokenizer = load_params_and_tokenizer(ckpt_dir)
        adapter = None
        if adapter_path is not None:
            assert config is None, "an adapter file brings its own configuration"
            config, adapter = load_adapter(adapter_path, args, method)
        init_distributed(torch_device, model_parallel_size)
        model = Transformer(args, config)
        load_base_weights(model, ckpt_dir, torch.bfloat16 if bf16 else torch.float32, torch_device, quantize)
        if adapter is not None:
            state.load_adapter_state_dict(model, adapter, str(adapter_path))
        else:
            state.reset_adapters(model, seed)
        state.freeze_base(model)
        model.eval()
        fast_decoding = FastDecoding(model, cuda_graphs, flash_attention2, compile=compile) if accelerate else None
        return cls(model, tokenizer, max_seq_len, max_batch_size, fast_decoding)

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
        is_complete: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt (token ids, BOS included) by up to `max_gen_len` tokens or to the end token, which is
        left out. Results are in the prompts' order.

        An answer also ends where prompt and answer fill `max_seq_len`. Up to `max_batch_size` sequences run at once.
        In float32 a result depends on its prompt, `seed` and its sample's number, and on neighbours by rounding alone.

        min_new_tokens: the end token is not chosen before this many. temperature 0: greedy. samples: number of each
        prompt's sample (default 0), for several draws from one prompt. on_finish(index, tokens): called as answers end.
        is_complete(tokens): an answer also ends where this holds of its tokens so far.
        Raises ValueError for an empty prompt, one without room for an answer, or settings out of range.
        """
        check_sampling(temperature, top_p)
        self._check(prompts, max_gen_len, min_new_tokens)
        if not prompts:
            return []
        requests = []
        for i, (prompt, sample) in enumerate(zip(prompts, samples or [0] * len(prompts), strict=True)):
            max_tokens = min(max_gen_len, self.max_seq_len - len(prompt))
            uniforms = seeded_uniforms(prompt, seed, sample, max_tokens).tolist() if temperature > 0 else []
            requests.append(Request(i, prompt, max_tokens, uniforms))
        params = SamplingParams(self.tokenizer.stop_ids, min_new_tokens, temperature, top_p, is_complete)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())
        async_lag = 0 if hooked else self.async_lag  # hooks shall see no extra step
        training = self.model.training
        self.model.eval()  # no noise in a router
        fast, steps = self.fast_decoding, max(request.max_tokens for request in requests)
        try:
            with fast.running(steps, hooked) if fast else nullcontext(decode) as step:
                for request in generate(self.model, requests, self.max_batch_size, params, step, async_lag):
                    if on_finish is not None:
                        on_finish(request.index, request.tokens)
        finally:
            self.model.train(training)
        return [request.tokens for request in requests]

    def _check(self, prompts: list[list[int]], max_gen_len: int, min_new_tokens: int) -> None:
        if max_gen_len < 1:
            raise ValueError(f"max_gen_len must be at least 1, not {max_gen_len}")
        if not 0 <= min_new_tokens <= max_gen_len:
            raise ValueError(f"min_new_tokens must be 0 to max_gen_len ({max_gen_len}), not {min_new_tokens}")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty")
            if len(prompt) >= self.max_seq_len:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens: no room for an answer within {self.max_seq_len}"
                )
            if min(prompt) < 0 or max(prompt) >= self.tokenizer.n_words:
                raise ValueError(f"prompt {i} has a token that is none of the tokenizer's {self.tokenizer.n_words}")
