"""Several events of a request as one: for readers who lag, and for those who want the whole."""

from server.engine.request import Choice, Event


def join(old: Event, new: Event) -> Event:
    """`old`, with what `new` adds; it is as if both had happened in one step."""
    known = {choice.index: choice for choice in old.choices}
    for choice in new.choices:
        if choice.index in known:
            _extend(known[choice.index], choice)
        else:
            old.choices.append(choice)
    old.done = new.done
    old.error, old.code = new.error, new.code
    old.prompt_tokens = old.prompt_tokens or new.prompt_tokens
    old.cached_tokens = old.cached_tokens or new.cached_tokens
    old.queued = old.queued or new.queued
    old.prompt_logprobs = old.prompt_logprobs or new.prompt_logprobs
    old.beam_rows = new.beam_rows
    old.tree = b"\n".join(part for part in (old.tree, new.tree) if part)
    return old


def _extend(old: Choice, new: Choice) -> None:
    old.tokens += new.tokens
    old.text += new.text
    old.logprobs += new.logprobs
    old.ranks += new.ranks
    old.top += new.top
    if new.finish is not None:
        old.finish, old.stop = new.finish, new.stop
        old.score, old.cumulative_logprob = new.score, new.cumulative_logprob
