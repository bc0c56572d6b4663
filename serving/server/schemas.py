"""What a client may send. Every field is bounded; a field that is unknown or not built is refused by its name."""

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from serving.request import MAX_NEW_TOKENS, MAX_SEED, MAX_TOP_K
from serving.server.errors import ApiError

MAX_TEXT_CHARS = 2_000_000
MAX_MESSAGES = 2_048
MAX_STOP_STRINGS = 4
MAX_INPUTS = 256

# OpenAI's fields that are not built, with the values that ask for nothing. Any other value is refused.
_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None, "medium"),
}
# What OpenAI's client puts into an assistant message that it received and sends back.
_NOT_BUILT_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}


def _text_or_list(value: Any) -> str:
    """Choose the member of a union by the value's type, so that an error speaks of that member alone."""
    return "<list>" if isinstance(value, list) else "<text>"


AsText, AsList, TextOrList = Tag("<text>"), Tag("<list>"), Discriminator(_text_or_list)
StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
StopStrings = Annotated[
    Annotated[StopString, AsText] | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), AsList],
    TextOrList,
]
InputText = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
ShortText = Annotated[str, Field(max_length=512)]
Body = TypeVar("Body", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class StreamOptions(_Strict):
    """`include_usage`: send one more event, with the token counts, before the end of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Generate(_Strict):
    """What both generating endpoints take."""

    model: ShortText | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_TOP_K)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False  # as vLLM calls it; for benchmarks
    user: ShortText | None = None  # OpenAI's label for the end user; not used
    metadata: Annotated[dict[ShortText, ShortText], Field(max_length=16)] | None = None  # likewise

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, fields: Any) -> Any:
        return _without(fields, _NOT_BUILT)

    @model_validator(mode="after")
    def _check_stream_options(self) -> "_Generate":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream true")
        return self

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list, whichever way they were sent."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with an event of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Generate):
    """POST /v1/completions: continue a prompt, given as text or as token ids."""

    prompt: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS), AsText]
        | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TEXT_CHARS), AsList],
        TextOrList,
    ]

    @field_validator("prompt", mode="before")
    @classmethod
    def _take_the_only_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise ValueError(f"{len(prompt)} prompts in one request are not supported; send one request for each")
            return prompt[0]
        return prompt


class TextPart(_Strict):
    """A piece of a message's content; text is the only kind."""

    type: Literal["text"]
    text: str = Field(max_length=MAX_TEXT_CHARS)


class Message(_Strict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Field(max_length=MAX_TEXT_CHARS), AsText]
        | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES), AsList],
        TextOrList,
    ]
    name: ShortText | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, fields: Any) -> Any:
        return _without(fields, _NOT_BUILT_IN_MESSAGES)

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates expect it: the content is one string."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class ChatRequest(_Generate):
    """POST /v1/chat/completions: answer the last turn of a chat."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)

    @model_validator(mode="after")
    def _check_limits(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: cannot be given together with max_completion_tokens; it is the older name")
        return self


class ClassifyRequest(_Strict):
    """POST /v1/classify: the labels of one text, or of each text in a list."""

    model: ShortText | None = None
    input: Annotated[
        Annotated[InputText, AsText] | Annotated[list[InputText], Field(min_length=1, max_length=MAX_INPUTS), AsList],
        TextOrList,
    ]
    user: ShortText | None = None  # as in the other endpoints; not used

    @property
    def texts(self) -> list[str]:
        """The texts as a list, whichever way they were sent."""
        return [self.input] if isinstance(self.input, str) else list(self.input)


def parse(model: type[Body], body: bytes) -> Body:
    """Return the request in `body`. Raises ApiError 400 that names the field, the value found and what is accepted."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        # A misspelt field is also a missing one: name the misspelling, and what is meant.
        problems = error.errors(include_url=False)
        misspelt = [problem for problem in problems if problem["type"] == "extra_forbidden"]
        missing = [str(problem["loc"][0]) for problem in problems if problem["type"] == "missing"]
        raise _explain([*misspelt, *problems][0], model, missing) from None


def _explain(problem: Any, model: type[BaseModel], missing: list[str]) -> ApiError:
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {message}")
    path = ".".join(str(part) for part in problem["loc"] if part not in ("<text>", "<list>"))[:200]
    if kind == "extra_forbidden":
        near = [] if "." in path else difflib.get_close_matches(path, list(model.model_fields), n=1) or missing
        hint = f"; did you mean {near[0]}?" if near else "; leave it out"
        return ApiError(400, f"{path}: unknown field{hint}", param=path, code="unknown_field")
    if kind == "value_error" and not path:
        return ApiError(400, message, param=message.split(":", 1)[0])
    found = "" if kind in ("missing", "value_error") else f" (found {_short(problem['input'])})"
    return ApiError(400, f"{path or 'body'}: {message}{found}", param=path or None)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _without(fields: Any, not_built: dict[str, tuple[Any, ...]]) -> Any:
    """Drop fields that ask for nothing; raise ValueError for one that asks for something that is not built."""
    if not isinstance(fields, dict):
        return fields
    for name in fields.keys() & not_built.keys():
        if not any(fields[name] == value for value in not_built[name]):
            raise ValueError(f"{name}: not supported by this server; leave it out")
    return {name: value for name, value in fields.items() if name not in not_built}
