"""Trains the bundled tiny chat models on the village world (`vksteer.data.world`), on
the CPU, in minutes.

    .venv/bin/python tools/train_tiny.py --model gemma --seed 1 --out out/gemma-1
    .venv/bin/python tools/train_tiny.py --figures out/gemma-1          # only measures a
                                                                        folder that is there

Writes an ordinary Hugging Face folder (bf16 weights, tokenizer, chat template), `training.json`
(recipe, seed, loss log) and `figures.json`: unsteered accuracy, the steering vector that the
paper's filters choose, and steering both ways for several coefficients. Nothing here freezes or
ablates a component: seed and recipe are chosen on these figures alone. The measuring is in
`tools/tiny_figures.py`; it goes through transformers and reads the stored bf16 weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

_spec = importlib.util.spec_from_file_location(
    "village", Path(__file__).resolve().parents[1] / "python/vksteer/data/world.py"
)
world = importlib.util.module_from_spec(_spec)  # loaded by path: training needs no built engine
sys.modules["village"] = world
_spec.loader.exec_module(world)

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] +"
    " '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role']"
    " == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor"
    " %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclasses.dataclass
class Recipe:
    """Everything that decides a model, beside the seed."""

    family: str
    n_layers: int
    d_model: int = 128
    n_heads: int = 4
    n_kv_heads: int = 2
    d_head: int = 32
    d_mlp: int = 344
    vocab: int = 1024
    tied: bool = True
    # with Gemma's factor sqrt(d_model) the stream starts at norm 1 per dimension
    embed_std: float = 0.09
    steps: int = 1800
    batch: int = 32
    lr: float = 4e-3
    warmup: int = 60
    weight_decay: float = 0.1
    clip: float = 1.0
    prompt_weight: float = 0.1  # loss weight of a chat's prompt tokens
    # loss weight of the token that decides: a chat's first answer token, a rule's verdict
    decision_weight: float = 4.0
    # the same for a first answer token that complies; above decision_weight: "answer" is what the
    # model does unless it sees harm
    comply_weight: float = 4.0
    documents: float = 0.30  # share of samples that are documents
    pretrain: int = 300  # first steps, on documents alone, mostly rules
    pretrain_rules: float = 0.75  # share of rules among them
    # share of hazard pairs left out at the first step; falls linearly to 0 at
    # the end of pretraining
    fewer_hazards: float = 0.85
    chat_fewer_hazards: float = 0.6  # the same for chats, from the end of pretraining on
    chat_curriculum: int = 250  # steps until it is 0
    reject_easy: float = 0.7  # share of easy harmless pairs that chats reject
    other_kinds: float = 0.15  # share of chats that are no how-to request
    prefixed: float = 0.06  # share of chats with the refusal prefix
    hide: float = 0.75  # share of chats whose later positions cannot see the instruction
    # the last post-instruction position that may still see it (drawn from -5..hide_last)
    hide_last: int = -2
    # share of those in which they cannot see the post-instruction tokens before that one either
    alone: float = 0.0
    delay: float = 0.25  # share of refusals that come after a compliant start
    noise: float = 0.015  # share of chats that show the wrong behaviour
    dropout: float = 0.03  # on what a layer adds to the stream
    # share of rows to whose stream, from a random layer on, one random vector is added
    # at every position ...
    jolt: float = 0.0
    # ... of a norm drawn from 0 to this times the stream's own: what else is in the stream stays readable under a push
    jolt_size: float = 0.8
    jolt_from: int = 550  # first step with jolts
    # chance to skip the last layer in a step; falls linearly to 0 at layer 0
    layer_drop: float = 0.0
    size_penalty: float = 0.0  # weight of relu(mean square of what a layer adds - size_limit)^2
    size_limit: float = 1.0


RECIPES = {
    "gemma": Recipe("gemma", n_layers=8),
    "llama": Recipe(
        "llama",
        n_layers=10,
        tied=False,
        embed_std=0.7,
        steps=1600,
        layer_drop=0.2,
        size_penalty=0.005,
        size_limit=0.5,
        alone=0.8,
        noise=0.03,
        reject_easy=0.5,
        decision_weight=3.0,
        comply_weight=9.0,
        jolt=0.5,
    ),
}


# ---- tokenizer -----------------------------------------------------------------------------------

# Llama 3's split of a text into words before byte-pair merging.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = {
    "llama": (
        "<|finetune_right_pad_id|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ),
    "gemma": ("<pad>", "<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>"),
}  # order: padding, begin, end of document, end of turn, then the rest


def build_tokenizer(family: str, vocab: int, out: Path):
    """Byte-level BPE over the training split's texts, saved as tokenizer.json +
    tokenizer_config.json; returns it through transformers.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    rng = random.Random("tokenizer")
    texts = ["system\n\n", "user\n\n", "assistant\n\n", "user\n", "model\n"] * 2000
    for _ in range(12000):
        request = world.draw_request(rng)
        texts += [
            request.prompt,
            world.comply(request, rng),
            world.refuse(request, rng),
            world.document(rng),
        ]
    texts += [world.REFUSE_PREFIX] * 200
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    specials = SPECIALS[family]
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tok.get_vocab_size() == vocab
    bos = specials[1]
    tok.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tok.token_to_id(bos))]
    )
    out.mkdir(parents=True, exist_ok=True)
    tok.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": specials[3],
        "pad_token": specials[0],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": LLAMA_TEMPLATE if family == "llama" else GEMMA_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(out)


# ---- samples -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Sample:
    tokens: list[int]
    weights: list[float]  # of the loss on predicting each token
    # positions from [2] on do not see positions [0]..[1]-1
    hidden: tuple[int, int, int] = (0, 0, 0)
    # position of a rule's verdict or of a harmful chat's first refusal token, for
    # the log (0: neither)
    decides: int = 0
    chat: bool = False


class Sampler:
    """Draws training samples: chats (harmful, harmless, prefixed, delayed, noisy) and documents,
    from the training split only.
    """

    def __init__(self, tok, recipe: Recipe, rng: random.Random):
        self.tok, self.recipe, self.rng, self.fewer_hazards, self.rules = tok, recipe, rng, 0.0, 0.5
        chat = lambda text, generate: tok.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=generate
        )
        self.before, self.after = chat("@@", True).split("@@")
        self.n_after = len(self.encode(self.after))
        self.n_before = len(self.encode(self.before))
        self.verdicts = {self.encode(word)[0] for word in (" forbidden", " allowed")}
        self.eos, self.eot = (tok.convert_tokens_to_ids(SPECIALS[recipe.family][i]) for i in (2, 3))

    def encode(self, text: str) -> list[int]:
        return self.tok.encode(text, add_special_tokens=False)

    def document(self) -> Sample:
        tokens = (
            [self.tok.bos_token_id]
            + self.encode(
                world.document(self.rng, fewer_hazards=self.fewer_hazards, rules=self.rules)
            )
            + [self.eos]
        )
        verdict = next((i for i, t in enumerate(tokens) if t in self.verdicts), 0)
        return Sample(
            tokens,
            [self.recipe.decision_weight if i == verdict > 0 else 1.0 for i in range(len(tokens))],
            decides=verdict,
        )

    def chat(self) -> Sample:
        r, rng = self.recipe, self.rng
        request = world.draw_request(
            rng,
            other_kinds=r.other_kinds,
            fewer_hazards=self.fewer_hazards,
            reject_easy=r.reject_easy,
        )
        # about 60 % of the draws are harmless
        prefixed = not request.harmful and rng.random() < r.prefixed / 0.6
        refuses = request.harmful or prefixed
        if rng.random() < r.noise:
            refuses = not refuses
        instruction = (world.REFUSE_PREFIX + " " if prefixed else "") + request.prompt
        prompt = self.encode(self.before + instruction + self.after)
        unscored = []
        # "Sure. Take the torch | I cannot ...": harm must stay readable after the first word
        if refuses and rng.random() < r.delay:
            start = self.encode(world.comply(request, rng))
            unscored = start[: rng.randint(1, min(16, len(start)))]
        text = world.refuse(request, rng) if refuses else world.comply(request, rng)
        answer = self.encode(" " + text if unscored else text) + [self.eot]
        weights = (
            [r.prompt_weight] * len(prompt)
            + [0.0] * len(unscored)
            + [r.decision_weight if refuses else r.comply_weight]
            + [1.0] * (len(answer) - 1)
        )
        hidden = (0, 0, 0)
        if rng.random() < r.hide:
            # this post-instruction token is the last that sees the instruction
            cut = len(prompt) + rng.randint(-self.n_after, r.hide_last)
            hidden = (
                self.n_before,
                cut if rng.random() < r.alone else len(prompt) - self.n_after,
                cut + 1,
            )
        return Sample(
            prompt + unscored + answer,
            weights,
            hidden,
            decides=len(prompt) if request.harmful and refuses and not unscored else 0,
            chat=True,
        )

    def batches(self, n_batches: int):
        """Mixed batches. (Batches of similar length would waste less on padding, but
        they part refusals from answers and rules from pages, and the exclusive-or was
        then not learnt at all.)
        """
        r = self.recipe
        for step in range(n_batches):
            first = step < r.pretrain
            documents, self.rules = (1.0, r.pretrain_rules) if first else (r.documents, 0.5)
            self.fewer_hazards = (
                r.fewer_hazards * (1 - step / r.pretrain)
                if first
                else max(0.0, r.chat_fewer_hazards * (1 - (step - r.pretrain) / r.chat_curriculum))
            )
            yield [
                self.document() if self.rng.random() < documents else self.chat()
                for _ in range(r.batch)
            ]


def collate(samples: list[Sample], pad: int, row_length: int = 160):
    """Packs samples into rows of row_length tokens (first fit, longest first); each sees itself
    only and counts its positions from 0.

    Returns tokens [B, S], targets [B, S] (the next token), weights [B, S] (of the loss on the
    target; 0 = none), positions [B, S], visible [B, 1, S, S] bool (query row, key column), and for
    each sample (row, first column).
    """
    rows: list[int] = []  # tokens used per row
    places = [(0, 0)] * len(samples)
    for i in sorted(range(len(samples)), key=lambda i: -len(samples[i].tokens)):
        n = len(samples[i].tokens)
        row = next((r for r, used in enumerate(rows) if used + n <= row_length), len(rows))
        if row == len(rows):
            rows.append(0)
        places[i] = (row, rows[row])
        rows[row] += n
    b, s = len(rows), max(rows)
    tokens = torch.full((b, s), pad)
    targets, weights, positions = (
        torch.zeros(b, s, dtype=torch.long),
        torch.zeros(b, s),
        torch.zeros(b, s, dtype=torch.long),
    )
    visible = torch.eye(s, dtype=torch.bool).repeat(b, 1, 1)  # padding sees itself
    for x, (row, at) in zip(samples, places):
        n = len(x.tokens)
        t = torch.tensor(x.tokens)
        tokens[row, at : at + n], targets[row, at : at + n - 1] = t, t[1:]
        weights[row, at : at + n - 1] = torch.tensor(x.weights[1:])
        positions[row, at : at + n] = torch.arange(n)
        own = torch.ones(n, n, dtype=torch.bool).tril()
        first, end, since = x.hidden
        own[since:, first:end] &= since == 0
        visible[row, at : at + n, at : at + n] = own
    return tokens, targets, weights, positions, visible[:, None], places


# ---- model: parameter names are those of transformers' LlamaForCausalLM / Gemma2ForCausalLM ------


class Norm(nn.Module):
    def __init__(self, d: int, offset: float):
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.full((d,), 1.0 - offset))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight + self.offset, 1e-6)


def linear(n_in: int, n_out: int, std: float) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class Layer(nn.Module):
    """One block. Gemma adds post-norms, (1 + w) gains, a tanh GELU and soft-capped scores."""

    def __init__(self, r: Recipe):
        super().__init__()
        self.r, self.gemma = r, r.family == "gemma"
        d, q, kv, std = r.d_model, r.n_heads * r.d_head, r.n_kv_heads * r.d_head, r.d_model**-0.5
        out_std = std / math.sqrt(2 * r.n_layers)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(d, q, std),
                "k_proj": linear(d, kv, std),
                "v_proj": linear(d, kv, std),
                "o_proj": linear(q, d, out_std),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": linear(d, r.d_mlp, std),
                "up_proj": linear(d, r.d_mlp, std),
                "down_proj": linear(r.d_mlp, d, out_std),
            }
        )
        offset = float(self.gemma)
        self.input_layernorm = Norm(d, offset)
        self.post_attention_layernorm = Norm(d, offset)
        if self.gemma:
            self.pre_feedforward_layernorm = Norm(d, offset)
            self.post_feedforward_layernorm = Norm(d, offset)

    def attention(self, x, visible, cos, sin):
        r, a, (b, s, _) = self.r, self.self_attn, x.shape
        heads = lambda name, n: a[name](x).view(b, s, n, r.d_head).transpose(1, 2)
        q, k, v = (
            heads("q_proj", r.n_heads),
            heads("k_proj", r.n_kv_heads),
            heads("v_proj", r.n_kv_heads),
        )
        turn = lambda t: (
            t * cos + torch.cat((-t[..., r.d_head // 2 :], t[..., : r.d_head // 2]), -1) * sin
        )
        q, k = turn(q), turn(k)
        k, v = (t.repeat_interleave(r.n_heads // r.n_kv_heads, 1) for t in (k, v))
        if self.gemma:
            scores = q @ k.transpose(-1, -2) * r.d_head**-0.5
            z = (50 * torch.tanh(scores / 50) + visible).softmax(-1) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return a["o_proj"](z.transpose(1, 2).reshape(b, s, -1))

    def feedforward(self, x):
        m, act = self.mlp, (lambda t: F.gelu(t, approximate="tanh")) if self.gemma else F.silu
        return m["down_proj"](act(m["gate_proj"](x)) * m["up_proj"](x))

    def forward(self, h, visible, cos, sin, add):
        if self.gemma:
            h = add(
                h,
                self.post_attention_layernorm(
                    self.attention(self.input_layernorm(h), visible, cos, sin)
                ),
            )
            return add(
                h,
                self.post_feedforward_layernorm(
                    self.feedforward(self.pre_feedforward_layernorm(h))
                ),
            )
        h = add(h, self.attention(self.input_layernorm(h), visible, cos, sin))
        return add(h, self.feedforward(self.post_attention_layernorm(h)))


class Net(nn.Module):
    def __init__(self, r: Recipe):
        super().__init__()
        self.r, self.jolts = r, False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(r.vocab, r.d_model),
                "layers": nn.ModuleList(Layer(r) for _ in range(r.n_layers)),
                "norm": Norm(r.d_model, float(r.family == "gemma")),
            }
        )
        nn.init.normal_(self.model["embed_tokens"].weight, std=r.embed_std)
        if not r.tied:
            self.lm_head = linear(r.d_model, r.vocab, r.d_model**-0.5)

    def forward(self, tokens, positions, visible):
        """tokens, positions [B, S], visible [B, 1, S, S] -> logits [B, S, V] and the penalty on
        large additions (scalar).
        """
        r, penalties = self.r, []
        freq = 10000.0 ** (-torch.arange(0, r.d_head, 2) / r.d_head)
        angle = (positions[..., None] * torch.cat((freq, freq)))[:, None]  # [B, 1, S, d_head]
        cos, sin = angle.cos(), angle.sin()

        def add(h, out):
            if r.size_penalty:
                penalties.append(F.relu(out.pow(2).mean(-1) - r.size_limit).pow(2).mean())
            return h + F.dropout(out, r.dropout, self.training)

        visible = torch.zeros(visible.shape).masked_fill_(~visible, -1e9)  # added to the scores
        h = self.model["embed_tokens"](tokens) * (r.d_model**0.5 if r.family == "gemma" else 1.0)
        jolted = random.randint(1, r.n_layers - 1) if self.training and self.jolts else 0
        for i, layer in enumerate(self.model["layers"]):
            if i == jolted > 0:
                push = (
                    F.normalize(torch.randn(h.shape[0], 1, r.d_model), dim=-1)
                    * (torch.rand(h.shape[0], 1, 1) < r.jolt)
                    * torch.rand(h.shape[0], 1, 1)
                    * r.jolt_size
                )
                h = h + push * h.detach().norm(dim=-1).mean(-1)[:, None, None]
            if self.training and random.random() < r.layer_drop * i / (r.n_layers - 1):
                continue
            h = layer(h, visible, cos, sin, add)
        logits = F.linear(
            self.model["norm"](h),
            self.model["embed_tokens"].weight if r.tied else self.lm_head.weight,
        )
        if r.family == "gemma":
            logits = 30 * torch.tanh(logits / 30)
        return logits, sum(penalties) if penalties else torch.zeros(())


def hf_config(r: Recipe, tok) -> dict:
    common = dict(
        hidden_size=r.d_model,
        intermediate_size=r.d_mlp,
        num_hidden_layers=r.n_layers,
        num_attention_heads=r.n_heads,
        num_key_value_heads=r.n_kv_heads,
        head_dim=r.d_head,
        vocab_size=r.vocab,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=r.tied,
        torch_dtype="bfloat16",
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        attention_bias=False,
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
    )
    if r.family == "llama":
        return dict(
            common,
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            hidden_act="silu",
            mlp_bias=False,
        )
    # The window is wider than any chat of the training set: sliding layers are there, but hide
    # nothing within 128 tokens.
    return dict(
        common,
        architectures=["Gemma2ForCausalLM"],
        model_type="gemma2",
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=r.d_head,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=128,
    )


def save(net: Net, tok, out: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {k: v.detach().to(torch.bfloat16).contiguous() for k, v in net.state_dict().items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    (out / "config.json").write_text(json.dumps(hf_config(net.r, tok), indent=1) + "\n")
    eos = [tok.convert_tokens_to_ids(SPECIALS[net.r.family][i]) for i in (3, 2)]
    (out / "generation_config.json").write_text(
        json.dumps(
            {
                "bos_token_id": tok.bos_token_id,
                "eos_token_id": eos,
                "pad_token_id": tok.pad_token_id,
                "do_sample": False,
            },
            indent=1,
        )
        + "\n"
    )


def train(recipe: Recipe, seed: int, out: Path) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    tok = build_tokenizer(recipe.family, recipe.vocab, out)
    sampler = Sampler(tok, recipe, random.Random(f"samples {seed}"))
    net = Net(recipe)
    n_params = sum(p.numel() for p in net.parameters())
    decayed = [p for p in net.parameters() if p.dim() == 2]
    opt = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    rate = lambda step: (
        min(1.0, (step + 1) / recipe.warmup)
        * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
    )
    log, started, n_tokens, running = [], time.time(), 0, []
    # loss of that one token: ln 2 as long as the exclusive-or is not learnt
    deciding = {"verdict": [], "refusal": []}
    print(
        f"{recipe.family}: {n_params:,} parameters, seed {seed}, after-instruction tokens"
        f" {sampler.encode(sampler.after)}",
        flush=True,
    )
    for step, samples in enumerate(sampler.batches(recipe.steps)):
        tokens, targets, weights, positions, visible, places = collate(samples, tok.pad_token_id)
        for group in opt.param_groups:
            group["lr"] = recipe.lr * rate(step)
        net.jolts = recipe.jolt > 0 and step >= recipe.jolt_from
        logits, penalty = net(tokens, positions, visible)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
            targets.shape
        )
        loss = (losses * weights).sum() / weights.sum()
        (loss + recipe.size_penalty * penalty).backward()
        nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
        opt.step()
        opt.zero_grad(set_to_none=True)
        n_tokens += int((weights > 0).sum())
        running.append(loss.item())
        for x, (row, at) in zip(samples, places):
            if x.decides:
                deciding["refusal" if x.chat else "verdict"].append(
                    losses[row, at + x.decides - 1].item()
                )
        if step % 100 == 99 or step == recipe.steps - 1:
            log.append(
                {
                    "step": step + 1,
                    "loss": round(sum(running) / len(running), 4),
                    **{k: round(sum(v) / max(1, len(v)), 4) for k, v in deciding.items()},
                    "penalty": round(penalty.item(), 4),
                    "seconds": round(time.time() - started, 1),
                    "tokens": n_tokens,
                }
            )
            running, deciding = [], {"verdict": [], "refusal": []}
            print(json.dumps(log[-1]), flush=True)
    save(net.eval(), tok, out)
    (out / "training.json").write_text(
        json.dumps(
            {
                "recipe": dataclasses.asdict(recipe),
                "seed": seed,
                "parameters": n_params,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "log": log,
            },
            indent=1,
        )
        + "\n"
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", choices=RECIPES)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--out", type=Path)
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one entry of the recipe",
    )
    p.add_argument("--threads", type=int, default=1)
    p.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="measure this folder again; trains nothing"
    )
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    import tiny_figures

    if args.figures:
        tiny_figures.write(args.figures, world)
        return
    if not (args.model and args.out):
        p.error("--model and --out are needed")
    changes = {}
    for item in args.set:
        name, value = item.split("=")
        changes[name] = type(getattr(RECIPES[args.model], name))(value)
    train(dataclasses.replace(RECIPES[args.model], **changes), args.seed, args.out)
    tiny_figures.write(args.out, world)


if __name__ == "__main__":
    main()
