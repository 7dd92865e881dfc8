"""transformers' beam search beside ours, on the very same log-probabilities.

transformers runs the model; every row of logits that it saw is kept under the tokens that led to
it, and ours is driven from those. So nothing differs but the search itself, and a search that asks
for a prefix that transformers never computed has already gone another way.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from server.engine.beam import Floats, Ints, Rules, Search, advance, begin
from server.engine.tree import Node, path

Prefix = tuple[int, ...]
Script = Callable[[Prefix], Sequence[float] | Tensor]  # prompt and output -> logits [vocabulary]

VOCABULARY = 48


class Answer(NamedTuple):
    tokens: list[int]
    score: float


class Run(NamedTuple):
    answers: list[Answer]
    steps: int
    logits: dict[Prefix, Tensor]  # what transformers saw
    scores: dict[Prefix, Tensor]  # the same after log-softmax and its processors
    raw: Any


@cache
def gpt2(seed: int, bias: bool = True) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return _sharpened(GPT2LMHeadModel(config), bias)


@cache
def llama(seed: int, bias: bool = True) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return _sharpened(LlamaForCausalLM(config), bias)


def _sharpened(model: Any, bias: bool) -> Any:
    """Random weights give nearly equal logits, and near-ties prove nothing."""
    if bias:
        likely = torch.zeros(VOCABULARY)
        likely[:8] = torch.linspace(4, 1, 8)  # so that ends among these come early and often
        model.lm_head.bias = torch.nn.Parameter(likely)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.4)
        for name, weight in model.named_parameters():
            if "lm_head" not in name and weight.dim() > 1:
                weight.mul_(8)
    return model.eval()


class Scripted(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A model whose logits are a function of the tokens."""

    config_class = PreTrainedConfig

    def __init__(self, script: Script, vocabulary: int) -> None:
        config = PreTrainedConfig(vocab_size=vocabulary, num_hidden_layers=0)
        super().__init__(config)
        self.script = script
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        rows = [torch.as_tensor(self.script(tuple(row))) for row in input_ids.tolist()]
        return CausalLMOutput(logits=torch.stack(rows).float()[:, None])

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    @classmethod
    def of(cls, script: Script, vocabulary: int) -> Any:
        model = cls(script, vocabulary)
        model.generation_config.use_cache = False
        return model


class _Notes(LogitsProcessor):  # type: ignore[misc]
    """Writes down which tokens each row of a step had."""

    def __init__(self) -> None:
        self.prefixes: list[list[Prefix]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.prefixes.append([tuple(row) for row in input_ids.tolist()])
        return scores


@torch.inference_mode()
def generate(model: Any, prompt: list[int], **options: Any) -> Run:
    """transformers' search, and all that it saw."""
    notes = _Notes()
    raw = model.generate(
        torch.tensor([prompt]),
        **{"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(1, len(prompt))}
        | options,
        logits_processor=LogitsProcessorList([notes]),
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    logits, scores = (
        {
            prefix: row
            for prefixes, rows in zip(notes.prefixes, found, strict=True)
            for prefix, row in zip(prefixes, rows, strict=True)
        }
        for found in (raw.logits, raw.scores)
    )
    return Run(_answers(raw, len(prompt)), len(raw.logits), logits, scores, raw)


def _answers(raw: Any, prompt: int) -> list[Answer]:
    """Trimmed by the beam indices: padding can be an end token (corner 22)."""
    lengths = (raw.beam_indices >= 0).sum(-1).tolist()
    tokens = [row[prompt : prompt + n] for row, n in zip(raw.sequences.tolist(), lengths)]
    return [Answer(*pair) for pair in zip(tokens, raw.sequences_scores.tolist(), strict=True)]


def tokens_of(node: Node) -> list[int]:
    return [each.token for each in path(node)]


def top(logprobs: Tensor, count: int) -> tuple[Ints, Floats]:
    """[rows, vocabulary] -> the best of each row; ties: the smaller id first."""
    order = logprobs.sort(dim=-1, descending=True, stable=True)
    ids, values = order.indices[:, :count], order.values[:, :count]
    return ids.to(torch.int32).numpy(), values.numpy()


def search(
    logprobs: Callable[[Prefix], Tensor], prompt: list[int], rules: Rules
) -> tuple[list[Answer], int, Search]:
    """Ours, given the log-probabilities after a prefix."""
    state, steps = begin(), 0
    while state.stop is None:
        rows = torch.stack([logprobs((*prompt, *tokens_of(node))) for node in state.live])
        state = advance(state, rules, *top(rows, rules.candidates)).search
        steps += 1
    answers = [Answer(tokens_of(e.node), e.score) for e in state.pool[: rules.n]]
    return answers, steps, state


def live_after(model: Any) -> Callable[[Prefix], Tensor]:
    """The log-probabilities after any prefix, asking the model."""

    @torch.inference_mode()
    def logprobs(prefix: Prefix) -> Tensor:
        logits: Tensor = model(torch.tensor([prefix])).logits[0, -1]
        return logits.float().log_softmax(-1)

    return logprobs


def check(model: Any, prompt: list[int], exact_exit: bool = True, **options: Any) -> Run:
    """Both searches, with transformers' names: tokens, scores and steps must be equal."""
    run = generate(model, prompt, **options)
    rules = rules_of(options, len(prompt))

    def logprobs(prefix: Prefix) -> Tensor:
        return run.logits[prefix].log_softmax(-1)

    answers, steps, _ = search(logprobs, prompt, rules)
    assert steps == run.steps, (options, prompt)
    compare(answers, run.answers, (options, prompt))
    if exact_exit:
        sooner, fewer, _ = search(logprobs, prompt, replaced(rules, exact_exit=True))
        assert fewer <= steps
        compare(sooner, run.answers, (options, prompt))
    return run


def compare(ours: list[Answer], theirs: list[Answer], case: Any) -> None:
    assert [a.tokens for a in ours] == [a.tokens for a in theirs], case
    np.testing.assert_allclose(
        [a.score for a in ours], [a.score for a in theirs], rtol=1e-5, atol=1e-4, err_msg=str(case)
    )


def replaced(rules: Rules, **changes: Any) -> Rules:
    return Rules(**{name: getattr(rules, name) for name in rules.__struct_fields__} | changes)


def rules_of(options: dict[str, Any], prompt: int = 0) -> Rules:
    ends = options.get("eos_token_id") or []
    return Rules(
        width=options["num_beams"],
        limit=options.get("max_new_tokens") or options["max_length"] - prompt,
        n=options.get("num_return_sequences", 1),
        ends=frozenset([ends] if isinstance(ends, int) else ends),
        min_tokens=options.get("min_new_tokens") or max(0, options.get("min_length", 0) - prompt),
        length_penalty=options.get("length_penalty", 1.0),
        early_stopping=options.get("early_stopping", False),
        exact_exit=False,
    )
