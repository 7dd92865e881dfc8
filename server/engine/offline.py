"""The engine without a server: many prompts at once, in this process.

from server import Engine
engine = Engine("folder or hub name")
for said in engine.generate(["Once upon", "def f("], max_tokens=40):
    print(said.choices[0].text)
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from msgspec.structs import replace
from tqdm import tqdm

from model.sampling import Sampling
from server.engine import engine
from server.engine.build import assemble, kit
from server.engine.fold import join
from server.engine.request import Event, Request
from server.errors import Busy


class Engine(engine.Engine):
    """The same engine as the server's, and its batch `generate`."""

    def __init__(self, model: str | None = None, *, prefix_cache: bool = True, **options: Any):
        """`options` are the server's settings: dtype, device, pages, rows, step_tokens, draft, …"""
        self.parts, scheduling = assemble(model=model, **options)
        super().__init__(**kit(self.parts, scheduling, prefix_cache))
        self._ids = count()

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        ignore_eos: bool = False,
        progress: bool = True,
        **fields: Any,
    ) -> list[Event]:
        """One event a prompt, in order, with everything that was said; `fields` are a Request's.

        A prompt that cannot be served raises before any is begun; one that fails has an `error`.
        """
        sampling = sampling or Sampling()
        if not ignore_eos:
            fields["eos"] = self.parts.eos
            stops = tuple(dict.fromkeys((*sampling.stops, *fields["eos"])))
            sampling = replace(sampling, stops=stops)
        requests = [
            Request(
                id=f"offline-{next(self._ids)}",
                prompt=self.parts.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
                max_tokens=max_tokens,
                sampling=sampling,
                **fields,
            )
            for prompt in prompts
        ]
        for request in requests:
            self.scheduler.check_request(request)
        return self._run(requests, progress)

    def _run(self, requests: list[Request], progress: bool) -> list[Event]:
        said: dict[str, Event] = {}
        waiting = iter(requests)
        entered = self._enter(waiting)
        off = None if progress else True  # None: off unless there is a terminal
        with tqdm(total=len(requests), unit="prompt", disable=off) as bar:
            while next(entered, False) or not self.idle:
                for event in self.step():
                    old = said.get(event.id)
                    said[event.id] = event if old is None else join(old, event)
                    bar.update(event.done)
        for event in said.values():
            event.choices.sort(key=lambda choice: choice.index)
        return [said[request.id] for request in requests]

    def _enter(self, requests: Iterator[Request]) -> Iterator[bool]:
        """Submit as many as the queue takes, each time that this is asked."""
        for request in requests:
            while True:
                try:
                    self.submit(request)
                    break
                except Busy:
                    yield True
