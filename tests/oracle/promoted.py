"""transformers in real float64. `model.double()` alone leaves norms, softmax and rotary embeddings
in float32 (they ask for it by name).
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class Promote(TorchFunctionMode):
    """Inside this context, code that asks for float32 gets float64, by name or as the default."""

    def __enter__(self):
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_default_dtype(self.default)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = lambda a: torch.float64 if a is torch.float32 else a
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


def load(folder, float64):
    """Transformers' model of `folder`, eager attention, float32 or (with everything promoted)
    float64. Call it inside `context(float64)`.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if not float64:
        return model
    model.double()
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
        if hasattr(module, "compute_default_rope_parameters"):
            _widen_rope(module)
        if type(module).__name__ == "GPTJRotaryEmbedding":
            from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

            with Promote():
                table = create_sinusoidal_positions(module.max_positions, module.pos_embd_dim)
            module.embed_positions = table
    return model


def _widen_rope(rotary):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
    for layer_type, kind in kinds.items():
        init = (
            rotary.compute_default_rope_parameters
            if kind == "default"
            else ROPE_INIT_FUNCTIONS[kind]
        )
        with Promote():
            freq, _ = init(
                rotary.config,
                device=torch.device("cpu"),
                **({"layer_type": layer_type} if layer_type else {}),
            )
        prefix = f"{layer_type}_" if layer_type else ""
        setattr(rotary, prefix + "inv_freq", freq.double())
        setattr(rotary, prefix + "original_inv_freq", freq.double().clone())
