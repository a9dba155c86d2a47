"""What requests of OpenAI's API may hold, and what that means as SamplingParams.

Where vLLM has a field beyond that API, its name and meaning are taken. A field that is not here is refused by its
name; null is as good as no field. Nothing here knows of engines or HTTP.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nanovllm.openai_api.tools import call_schema, check_tools
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

MOST_SAMPLES = 128  # `n`, as at OpenAI
LARGEST_ID = 2**32 - 1  # of a token that can be decoded
MOST_FIELDS = 100  # of a body
MOST_WORDS = 256  # in `stop` and `bad_words`, each of which is looked for at every token


def items_of(*kinds: type) -> AfterValidator:
    """Checks a list up to its first bad item. pydantic would describe each of millions, in gigabytes and minutes."""

    def check(items: list[Any]) -> list[Any]:
        for item in items:
            if type(item) not in kinds:
                names = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"its items must be of type {names}, got {type(item).__name__}")
        return items

    return AfterValidator(check)


Texts = Annotated[list[Any], items_of(str)]
Words = Annotated[list[Any], Field(max_length=MOST_WORDS), items_of(str)]
TokenIds = Annotated[list[Any], items_of(int)]
Objects = Annotated[list[Any], items_of(dict)]
Tools = Annotated[Objects, AfterValidator(check_tools)]


class Body(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if type(fields) is dict and len(fields) > MOST_FIELDS:
            raise ValueError(f"an object must have at most {MOST_FIELDS} fields, got {len(fields)}")
        return {name: value for name, value in fields.items() if value is not None} if type(fields) is dict else fields


class StreamOptions(Body):
    """How a stream is sent: with its usage at the end, and without random characters that hide lengths."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Draw(Body):
    """What is passed on to SamplingParams under the same name, which checks it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int = Field(1, le=MOST_SAMPLES)
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: Words | str | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    logit_bias: dict[str, Any] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Words | None = None


class GenerationRequest(Draw):
    """What both kinds of requests may hold.

    Attributes:
        model: the name of the served model; none will do.
        stream, stream_options: send what there is as server-sent events, and the usage at the end.
        max_tokens: most tokens to generate.
        return_token_ids: tell the ids of the tokens too.
        response_format, structured_outputs, guided_json, guided_regex, guided_choice, guided_grammar: the form that
            the text must have, by one of these.
        priority: lower ones go first, where the engine schedules by priority.
        user and those behind it: passed over, as they change nothing.
    """

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    return_token_ids: bool = False
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    priority: int = 0
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """The parameters; `defaults` has those that the request leaves open.

        Raises:
            ValueError: a response_format that is not served, or several forms.
        """
        params = defaults.clone()
        for name in Draw.model_fields:
            if name in self.model_fields_set:
                setattr(params, name, getattr(self, name))
        params.max_tokens = self.most_tokens()
        params.logprobs = self.num_logprobs()
        params.structured_outputs = self.structure()
        params.output_kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        return params

    def structure(self) -> dict[str, Any] | None:
        """The form that the text must have, as `structured_outputs` says it. Raises ValueError if it has several."""
        forms = {
            f"guided_{name}": {name: value}
            for name in ("json", "regex", "choice", "grammar")
            if (value := getattr(self, f"guided_{name}")) is not None
        }
        if self.structured_outputs is not None:
            forms["structured_outputs"] = self.structured_outputs
        if self.response_format is not None and self.response_format.get("type") != "text":
            forms["response_format"] = read_format(self.response_format)
        if len(forms) > 1:
            raise ValueError(f"the form of a text is given by one of {', '.join(forms)}, got several")
        return next(iter(forms.values()), None)


class CompletionRequest(GenerationRequest):
    """A request for the continuation of prompts: a text, its token ids, or a list of either.

    `logprobs` is the number of most likely tokens to tell, `echo` whether texts and logprobs begin with the prompt's.
    """

    prompt: Annotated[list[Any], items_of(str, int, list)] | str
    logprobs: int | None = None
    echo: bool = False
    best_of: Literal[1] = 1

    def prompts(self) -> list[str | list[int]]:
        """Each prompt. Raises ValueError if there is none."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        if not self.prompt:
            raise ValueError("prompt must be a text, token ids or a list of these, got an empty list")
        return self.prompt

    def most_tokens(self) -> int | None:
        """16, as at OpenAI, if the request does not say."""
        return 16 if self.max_tokens is None else self.max_tokens

    def num_logprobs(self) -> int | None:
        """How many most likely tokens to tell besides each, None: nothing."""
        return self.logprobs

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """See GenerationRequest."""
        params = super().sampling_params(defaults)
        params.prompt_logprobs = params.logprobs if self.echo else None
        return params


class ChatRequest(GenerationRequest):
    """A request for the answer to a conversation.

    `logprobs` says whether they are told, `top_logprobs` of how many most likely tokens. The tools that `tool_choice`
    lets the model call are told of by the chat template: none if it is "none". With "required", or a tool's name, the
    answer is a call. Without `parallel_tool_calls`, further ones are dropped.
    """

    messages: Objects
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: Tools | None = None
    tool_choice: dict[str, Any] | str = "auto"
    parallel_tool_calls: bool = True
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.tool_choice not in ("auto", "none") and not self.forced_tools:
            choices = "'auto', 'none' or, with tools, 'required' or a function with the name of one"
            raise ValueError(f"tool_choice must be {choices}, got {self.tool_choice!r:.100}")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call."""
        return self.tools or None if self.tool_choice != "none" else None

    @property
    def forced_tools(self) -> list[dict[str, Any]]:
        """The functions of which one must be called; none if the model may answer otherwise."""
        functions = [tool["function"] for tool in self.tools or ()]
        if isinstance(self.tool_choice, dict):
            named = self.tool_choice.get("function")
            name = named.get("name") if isinstance(named, dict) else None
            return [function for function in functions if function["name"] == name]
        return functions if self.tool_choice == "required" else []

    def structure(self) -> dict[str, Any] | None:
        """See GenerationRequest; the call of a tool is a form too."""
        form = super().structure()
        if not self.forced_tools:
            return form
        if form is not None:
            raise ValueError(
                f"tool_choice={self.tool_choice!r} gives the text a form, so nothing else may, got {form!r:.200}"
            )
        return {"json": call_schema(self.forced_tools)}

    def template_options(self) -> dict[str, Any]:
        """How the conversation is rendered, for `ChatTemplate.render`."""
        return {
            "tools": self.offered_tools,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    def most_tokens(self) -> int | None:
        """As many as the model goes if the request does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        """How many most likely tokens to tell besides each, None: nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Body):
    """A text or a conversation whose token ids are asked for."""

    model: str | None = None
    prompt: str | None = None
    messages: Objects | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of prompt and messages must be given")
        return self

    def template_options(self) -> dict[str, Any]:
        """How the conversation is rendered, for `ChatTemplate.render`."""
        names = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        return {name: getattr(self, name) for name in names}


class DetokenizeRequest(Body):
    """Token ids whose text is asked for."""

    model: str | None = None
    tokens: TokenIds

    @model_validator(mode="after")
    def _check(self) -> "DetokenizeRequest":
        if self.tokens and not 0 <= min(self.tokens) <= max(self.tokens) <= LARGEST_ID:
            raise ValueError(f"tokens must be between 0 and {LARGEST_ID}")
        return self


def read_format(response_format: dict[str, Any]) -> dict[str, Any]:
    """What a response_format asks for, as `structured_outputs` says it.

    Raises:
        ValueError: it is of no kind that is served.
    """
    kind, named = response_format.get("type"), response_format.get("json_schema")
    if kind == "json_object" and not any(value for name, value in response_format.items() if name != "type"):
        return {"json_object": True}
    if kind == "json_schema" and isinstance(named, dict) and isinstance(named.get("schema"), dict):
        return {"json": named["schema"]}
    kinds = '"text", "json_object" with nothing beside it, or "json_schema" with a json_schema that has a schema'
    raise ValueError(f"response_format must be of type {kinds}, got {response_format!r:.200}")
