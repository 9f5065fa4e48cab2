"""Training samples of the bundled tiny models: chats and documents of the village world, packed
into rows.
"""

from __future__ import annotations

import dataclasses
import random

import torch
from tiny_recipe import Recipe
from tiny_tokenizer import SPECIALS
from tiny_world import world


@dataclasses.dataclass
class Sample:
    tokens: list[int]
    weights: list[float]  # of the loss of predicting each token
    # Positions from hidden[2] on do not see the positions hidden[0] to hidden[1] - 1.
    hidden: tuple[int, int, int] = (0, 0, 0)
    # For the log: position of a rule's verdict or of a harmful chat's first refusal token, 0 for
    # neither.
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
        # About 60 % of the requests are harmless.
        prefixed = not request.harmful and rng.random() < r.prefixed / 0.6
        refuses = request.harmful or prefixed
        if rng.random() < r.noise:
            refuses = not refuses
        instruction = (world.REFUSE_PREFIX + " " if prefixed else "") + request.prompt
        prompt = self.encode(self.before + instruction + self.after)
        unscored = []
        # "Sure. Take the torch | I cannot ...": a refusal may come after the first words, so harm
        # must still be represented there.
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
            # The post-instruction token before `cut` + 1 is the last that sees the instruction.
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
        """Mixed batches. Batches of similar length would need less padding, but they separate
        refusals from answers and rules from pages, and then the exclusive-or was never learnt.
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
    """Packs samples into rows of row_length tokens (first fit, longest first). Each sample attends
    only to itself and counts its positions from 0.

    Returns tokens [B, S], targets [B, S] (the next token), weights [B, S] (of the loss of the
    target, 0 for none), positions [B, S], visible [B, 1, S, S] bool (query, key), and (row, first
    column) of each sample.
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
    visible = torch.eye(s, dtype=torch.bool).repeat(b, 1, 1)  # padding attends to itself
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
