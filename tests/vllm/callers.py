"""Asks vLLM's server through unchanged SDKs. .venv-vllm's Python runs it, so it imports nothing of the tests.

Reads one line of JSON from stdin, `{"url", "key", "sdk", "rows": [{"model", "question", "prompt", "header"}], "alone":
[model]}`, and writes one: for each row the answers to each call of the SDK, where all rows are sent together; the error
for a missing model; and for `openai` the list of models, and some of them alone.
"""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

COUNT = 24  # tokens


def main() -> None:
    """Answers the one line."""
    asked = json.loads(sys.stdin.readline())
    make: Callable[[str, str], Any] = {"openai": OpenAI, "litellm": LiteLLM, "anthropic": Anthropic}[asked["sdk"]]
    caller = make(asked["url"], asked["key"])
    with ThreadPoolExecutor(len(asked["rows"]) or 1) as threads:
        rows = list(threads.map(lambda row: caller.ask(**row), asked["rows"]))
    models = caller.models(asked["alone"])
    json.dump({"rows": rows, "models": models, "missing": caller.missing("demo/nosuch")}, sys.stdout)


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _headers(header: str | None) -> dict[str, Any]:
    return {} if header is None else {"extra_headers": {"X-Prefix-Adapter": header}}


def _told(model: str, text: str, parameters: Any = None) -> dict[str, Any]:
    return {"model": model, "text": text, "parameters": parameters}


class OpenAI:
    """The OpenAI SDK."""

    def __init__(self, url: str, key: str) -> None:
        import openai

        self._sdk, self._client = openai, openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

    def ask(self, model: str, question: str, prompt: str, header: str | None) -> dict[str, Any]:
        """Asks for chat, completions and responses, each streamed too."""
        options: Any = {"model": model, "temperature": 0, "max_tokens": COUNT, **_headers(header)}
        chats, completions = self._client.chat.completions, self._client.completions
        raw = chats.with_raw_response.create(messages=_messages(question), **options)
        chat = raw.parse()
        completion = completions.create(prompt=prompt, **options)
        chunks = list(chats.create(messages=_messages(question), stream=True, **options))
        usage = {"include_usage": True}
        pieces = list(completions.create(prompt=prompt, stream=True, stream_options=usage, **options))
        options = {"model": model, "temperature": 0, "max_output_tokens": COUNT, **_headers(header)}
        responded = self._client.responses.create(input=question, **options)
        events = list(self._client.responses.create(input=question, stream=True, **options))
        done: Any = events[-1]
        return {
            "chat": _told(chat.model, chat.choices[0].message.content, _extra(chat)),
            "completion": _told(completion.model, completion.choices[0].text, _extra(completion)),
            "chat streamed": _told(
                "|".join({chunk.model for chunk in chunks}),
                "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
                _extra(chunks[-1]),
            ),
            "completion streamed": _told(
                "|".join({piece.model for piece in pieces}),
                "".join(piece.choices[0].text for piece in pieces if piece.choices),
                _extra(pieces[-1]),
            ),
            "response": _told(responded.model, responded.output_text, _extra(responded)),
            "response streamed": _told(done.response.model, done.response.output_text, _extra(done.response)),
            "headers": [raw.headers.get("prefix-version"), raw.headers.get("prefix-digest")],
        }

    def models(self, alone: list[str]) -> dict[str, Any]:
        """Returns the list of models, and some of them alone."""
        listed = [model.model_dump() for model in self._client.models.list()]
        return {"listed": listed, "alone": [self._client.models.retrieve(name).model_dump() for name in alone]}

    def missing(self, model: str) -> str:
        """Returns the error that the SDK raises for a missing model."""
        try:
            self._client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Why?"}])
        except self._sdk.NotFoundError as error:
            return str(error)
        return "nothing was raised"


def _extra(answer: Any) -> Any:
    return (answer.model_extra or {}).get("kv_transfer_params")


class LiteLLM:
    """LiteLLM, which puts a provider before the model's name and removes it again."""

    def __init__(self, url: str, key: str) -> None:
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        import litellm

        self._sdk, self._options = litellm, {"api_base": f"{url}/v1", "api_key": key, "num_retries": 0}

    def ask(self, model: str, question: str, prompt: str, header: str | None) -> dict[str, Any]:
        """Asks for chat and completions, each streamed too."""
        options: Any = {"model": f"hosted_vllm/{model}", "temperature": 0, "max_tokens": COUNT, **self._options}
        options |= _headers(header)
        chat = self._sdk.completion(messages=_messages(question), **options)
        chunks = list(self._sdk.completion(messages=_messages(question), stream=True, **options))
        completion = self._sdk.text_completion(prompt=prompt, **options)
        return {
            "chat": _told(chat.model, chat.choices[0].message.content),
            "chat streamed": _told(
                chunks[-1].model, "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            ),
            "completion": _told(completion.model, completion.choices[0].text),
        }

    def models(self, alone: list[str]) -> None:
        """Returns nothing, because LiteLLM has its own list."""

    def missing(self, model: str) -> str:
        """Returns the error that LiteLLM raises for a missing model."""
        try:
            self._sdk.completion(model=f"hosted_vllm/{model}", messages=_messages("Why?"), **self._options)
        except self._sdk.NotFoundError as error:
            return str(error)
        return "nothing was raised"


class Anthropic:
    """The Anthropic SDK."""

    def __init__(self, url: str, key: str) -> None:
        import anthropic

        self._sdk = anthropic
        self._client = anthropic.Anthropic(base_url=url, auth_token=key, max_retries=0)

    def ask(self, model: str, question: str, prompt: str, header: str | None) -> dict[str, Any]:
        """Asks for messages, streamed too."""
        options: Any = {"model": model, "max_tokens": COUNT, "messages": _messages(question), **_headers(header)}
        options["extra_body"] = {"temperature": 0}  # newer versions of the SDK have no argument for it
        message = self._client.messages.create(**options)
        events = list(self._client.messages.create(stream=True, **options))
        first: Any = events[0]
        texts = [getattr(getattr(event, "delta", None), "text", None) or "" for event in events]
        return {
            "message": _told(message.model, message.content[0].text, _extra(message)),
            "message streamed": _told(first.message.model, "".join(texts), _extra(events[-1])),
        }

    def models(self, alone: list[str]) -> None:
        """Returns nothing, because the list has OpenAI's form."""

    def missing(self, model: str) -> str:
        """Returns the error that the SDK raises for a missing model."""
        try:
            self._client.messages.create(model=model, max_tokens=1, messages=[{"role": "user", "content": "Why?"}])
        except self._sdk.NotFoundError as error:
            return str(error)
        return "nothing was raised"


if __name__ == "__main__":
    main()
