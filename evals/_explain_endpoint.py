"""Questions to a language model behind an OpenAI-compatible endpoint, and answers kept in a file.

Each answer is written down as it comes, under a hash of all that was asked, so that what was
stopped goes on, and what was once answered is played again without a network. The key is read from
the environment, goes into one header and nowhere else.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from saekit.errors import ConfigError, SaekitError, first_line

Message = dict[str, str]

KEY = "SAEKIT_API_KEY"

_TRIES = 5
_AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""Status codes after which the same question may be answered."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where questions go, and how."""

    url: str
    """Up to and with `/v1`."""
    model: str
    max_tokens: int = 200
    concurrency: int = 8
    timeout: float = 120.0
    """Seconds for one answer."""
    wait: float = 1.0
    """Seconds before a question is asked again; twice as many each time after."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"endpoint '{self.url}' is no address: give one such as https://HOST/v1"
            )
        local = parts.hostname == "localhost" or parts.hostname.startswith("127.")
        if parts.scheme == "http" and not local and os.environ.get(KEY):
            raise ConfigError(
                f"endpoint '{self.url}' is not encrypted, and the key in {KEY} would be sent in "
                f"the open: give an https address, or unset {KEY}"
            )
        for name in ("max_tokens", "concurrency", "timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")

    def body(self, messages: Sequence[Message]) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }


@dataclass(frozen=True)
class Cost:
    """What questions that are still to be sent will take."""

    n: int
    tokens_in: int
    """Estimated: a token for every three characters, which is more than most texts have."""
    tokens_out: int
    """At most."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.n + other.n,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
        )

    def price(self, per_million_in: float, per_million_out: float) -> float:
        return (self.tokens_in * per_million_in + self.tokens_out * per_million_out) / 1e6


class Answers:
    """Answers by question: those of the file, and where `send`, those of the endpoint."""

    def __init__(self, path: Path, endpoint: Endpoint, *, send: bool = True) -> None:
        self.path, self.endpoint, self.send = path, endpoint, send
        self.known: dict[str, str] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        lines = text.split("\n")
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line) if line else None
                if entry is not None:
                    self.known[str(entry["key"])] = str(entry["answer"])
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines):  # stopped while it was written: it is asked again
                    os.truncate(self.path, len(text.encode()) - len(line.encode()))
                    return
                raise SaekitError(
                    f"{self.path}, line {number} is no stored answer ({first_line(error)}): take "
                    "the line out, and it is asked again"
                ) from error
        if text and not text.endswith("\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def to(self, messages: Sequence[Message]) -> str | None:
        """The stored answer to a question."""
        return self.known.get(_key(self.endpoint.body(messages)))

    def cost(self, questions: Sequence[Sequence[Message]]) -> Cost:
        """Of those that no answer is stored of."""
        new = [each for each in questions if self.to(each) is None]
        characters = sum(len(message["content"]) for each in new for message in each)
        return Cost(len(new), -(-characters // 3), len(new) * self.endpoint.max_tokens)

    def ask(
        self,
        questions: Sequence[Sequence[Message]],
        told: Callable[[int], object] = lambda _: None,
    ) -> list[str]:
        """An answer to each; only what is not stored is sent, several at once.

        Raises SaekitError where the endpoint refuses or does not answer; answers that came before
        are kept. Where nothing is to be sent, raises for the first question that has no answer.
        """
        bodies = {_key(body): body for body in map(self.endpoint.body, questions)}
        missing = {key: body for key, body in bodies.items() if key not in self.known}
        told(len(questions) - len(missing))
        if missing and not self.send:
            raise SaekitError(
                f"{self.path} holds no answer to {len(missing)} of {len(questions)} questions: "
                "they can only be answered by the endpoint, without --replay"
            )
        if missing:
            asyncio.run(self._send(missing, told))
        return [self.known[_key(self.endpoint.body(each))] for each in questions]

    async def _send(self, bodies: dict[str, dict[str, Any]], told: Callable[[int], object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        key = os.environ.get(KEY, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        waiting = iter(bodies.items())
        with self.path.open("a", encoding="utf-8") as file:
            async with httpx.AsyncClient(headers=headers, timeout=self.endpoint.timeout) as client:

                async def work() -> None:
                    for name, body in waiting:
                        answer = await self._one(client, body)
                        entry = {"key": name, "answer": answer, "request": body}
                        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                        file.flush()
                        self.known[name] = answer
                        told(1)

                async def until_one_fails() -> None:
                    # What is on its way then has its price already, and is waited for.
                    try:
                        await work()
                    except SaekitError as error:
                        failures.append(error)
                        for _ in waiting:
                            pass

                failures: list[SaekitError] = []
                n = min(self.endpoint.concurrency, len(bodies))
                await asyncio.gather(*(until_one_fails() for _ in range(n)))
        if failures:
            raise failures[0]

    async def _one(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        url = f"{self.endpoint.url.rstrip('/')}/chat/completions"
        why = ""
        for number in range(1, _TRIES + 1):
            try:
                response = await client.post(url, json=body)
                if response.status_code == 200:
                    return _content(response)
                why, again = _status(response), response.status_code in _AGAIN
            except httpx.TransportError as error:
                why, again = f"{type(error).__name__} {first_line(error)}".strip(), True
            if not again:
                raise SaekitError(f"{url} refuses: {why}. Check --endpoint, --model and {KEY}")
            if number < _TRIES:
                await asyncio.sleep(self.endpoint.wait * 2 ** (number - 1))
        raise SaekitError(
            f"{url} did not answer, asked {_TRIES} times: {why}. What was answered is kept; the "
            "same command goes on from there"
        )


def _key(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _content(response: httpx.Response) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise SaekitError(
            f"{response.url} answers with something else than a chat completion "
            f"({first_line(error)}): is --endpoint the address up to /v1?"
        ) from error
    return str(content or "")


def _status(response: httpx.Response) -> str:
    text = " ".join(response.text.split())[:200]
    if key := os.environ.get(KEY):
        text = text.replace(key, "…")
    return f"status {response.status_code}, {text}"
