"""The bodies that the routes take: every field is honoured, or refused with a sentence.

Fields stand here once. Names that OpenAI's clients know and that we do not serve stand in
`NOT_SERVED`, each with the values that ask for nothing and so are fine. All others are unknown.
The caps come from `Limits`, by name, through the validation context.
"""

from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field

from server.api.fields import (
    NotServed,
    at_most,
    in_vocabulary,
    longest,
    no_empty,
    no_more,
    prompts,
    strings,
)

INT64 = 1 << 63


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


def capped(name: str) -> AfterValidator:
    """A number is at most what `Limits` say."""
    return AfterValidator(at_most(name))


def counted(name: str) -> BeforeValidator:
    """A list or object is not even looked into when it has more entries than `Limits` say."""
    return BeforeValidator(no_more(name))


def empty(kind: type[list[Any]] | type[dict[str, Any]]) -> Any:
    """A default that is made for each body; one that stood here would be copied deeply."""
    return Field(default_factory=kind, json_schema_extra={"default": kind()})


class _First(FailFast):
    """A list with a wrong entry is not looked through for more."""

    def __hash__(self) -> int:
        return hash(_First)


FIRST = _First()
Count = Annotated[int, Field(ge=1)]
Known = AfterValidator(in_vocabulary)
Many = Annotated[list[int], FIRST, Known]
Some = Annotated[list[int], FIRST, Len(1), Known]
Ids = Annotated[Many, counted("stop_ids")]
Texts = Annotated[list[str], FIRST, BeforeValidator(strings), AfterValidator(no_empty)]
Short = Annotated[Texts, AfterValidator(longest("stop_bytes"))]
Parts = Annotated[list[dict[str, Any]], FIRST]
Shown = Annotated[int, Field(ge=0), capped("logprobs")]
Width = Annotated[Count, capped("beam_width")]


class StreamOptions(Strict):
    include_usage: bool = False  # one more chunk, with the usage of all
    continuous_usage_stats: bool = False  # the usage so far in every chunk
    include_obfuscation: Literal[False] = False


class BeamStream(Strict):
    mode: Literal["committed", "final", "windowed"] = "committed"
    events: Literal["none", "tree"] = "none"
    w: int = Field(16, ge=1, le=1 << 20, description="windowed: the longest lag, in tokens")
    max_events_per_s: float = Field(20.0, gt=0, le=1000)


class Sampled(Strict):
    """What both routes take: OpenAI's fields, then those of the big servers, then beams."""

    model: str | None = Field(None, max_length=4096)
    n: Annotated[Count, capped("n")] = 1
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[str, float], counted("logit_bias")] = empty(dict)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: Annotated[Short, counted("stop")] = empty(list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="who asks, for the client's own books")

    top_k: int = Field(0, ge=-1, lt=1 << 31, description="0 and -1: all")
    min_p: float = Field(0.0, ge=0, le=1)
    typical_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: Ids = empty(list)
    bad_words: Annotated[
        Short,
        counted("stop_ids"),
        Field(description="As they are spelled in tokens; the same text in others may come."),
    ] = empty(list)
    allowed_token_ids: Annotated[list[int], FIRST, Field(min_length=1), Known] | None = None
    prompt_logprobs: Shown | None = None
    return_token_ids: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="keep the last so many tokens of the prompt; -1: what fits"
    )
    priority: int = Field(0, ge=-INT64, lt=INT64, description="smaller goes first")
    cache_salt: str = Field("", max_length=256, description="share pages only under this word")

    use_beam_search: bool | None = None
    beam_width: Width | None = None
    num_beams: Width | None = None
    num_return_sequences: Annotated[Count, capped("n")] | None = None
    best_of: Annotated[Count, capped("n")] | None = None
    length_penalty: float | None = Field(None, ge=-100, le=100)
    early_stopping: bool | Literal["never"] | None = None
    num_beam_groups: Count | None = None
    diversity_penalty: float | None = Field(None, ge=-100, le=100)
    beam_sample: bool | None = None
    exact_exit: bool | None = None
    beam_stream: BeamStream | None = None
    strict: bool = Field(False, description="refuse what would be of no effect")


class CompletionBody(Sampled):
    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(prompts)]
    max_tokens: int = Field(16, ge=0)
    logprobs: Shown | None = None
    echo: bool = False
    suffix: str | None = None
    add_special_tokens: bool = True


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Parts | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Parts | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], FIRST, Len(1), counted("messages")]


class ChatBody(Sampled):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Shown | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, str | int | float | bool] = {}
    safety_identifier: str | None = Field(None, description="as `user`")
    prompt_cache_key: str | None = Field(None, description="no effect here: one cache for all")


class EmbeddingBody(Strict):
    model: str | None = Field(None, max_length=4096)
    input: Annotated[list[str] | list[list[int]], BeforeValidator(prompts)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    user: str | None = None


class TokenizeBody(Strict):
    model: str | None = Field(None, max_length=4096)
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False


class DetokenizeBody(Strict):
    model: str | None = Field(None, max_length=4096)
    tokens: Many
    skip_special_tokens: bool = False


NOTHING: tuple[Any, ...] = ()
NOT_SERVED: dict[type[Strict], NotServed] = {
    CompletionBody: {
        "response_format": (({"type": "text"},), "only text is served yet"),
    },
    ChatBody: {
        "audio": (NOTHING, "this server makes text"),
        "function_call": (("none", "auto"), "functions cannot be called yet"),
        "functions": (([],), "functions cannot be called yet"),
        "metadata": (({},), "nothing is stored here to attach it to"),
        "modalities": ((["text"],), "this server makes text"),
        "moderation": (NOTHING, "no moderation runs here"),
        "parallel_tool_calls": (NOTHING, "tools cannot be called yet"),
        "prediction": (NOTHING, "predicted outputs are not served"),
        "prompt_cache_options": (({}, {"mode": "implicit"}), "the cache has no breakpoints"),
        "prompt_cache_retention": (("in_memory",), "the cache lives in memory"),
        "reasoning_effort": (("none",), "say it through chat_template_kwargs"),
        "response_format": (({"type": "text"},), "only text is served yet"),
        "service_tier": (("auto", "default"), "there is one tier; see priority"),
        "store": ((False,), "nothing is stored here"),
        "tool_choice": (("none", "auto"), "tools cannot be called yet"),
        "tools": (([],), "tools cannot be called yet"),
        "verbosity": (("medium",), "the model has no such knob"),
        "web_search_options": (NOTHING, "this server does not search the web"),
    },
}
GUIDED = (
    "guided_choice guided_grammar guided_json guided_regex structured_outputs json_schema regex"
    " ebnf grammar"
)
CODE = "chat_template logits_processors prompt_embeds"
for fields in NOT_SERVED.values():
    fields |= dict.fromkeys(GUIDED.split(), (NOTHING, "guided decoding is not served yet"))
    fields |= dict.fromkeys(CODE.split(), (NOTHING, "a request's own code is never run"))
