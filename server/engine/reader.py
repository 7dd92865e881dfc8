"""What a step's output means: tokens, text, log-probabilities, and who has come to an end."""

import numpy as np

from model.batch import Floats, Ints, Output
from server.engine.beam import Ending
from server.engine.beam_group import Grown
from server.engine.group import Branch, Group, Rivals
from server.engine.outbox import Outbox
from server.engine.request import Choice, Request, Stats
from server.engine.rows import Step
from server.engine.text import Text
from server.engine.tree import Node, path


class Reader:
    """Reads one output; the lists are made once, because numpy is slow a number at a time."""

    def __init__(self, step: Step, output: Output, outbox: Outbox, stats: Stats) -> None:
        self._step, self._output = step, output
        self._outbox, self._stats = outbox, stats
        self._tokens: list[int] = output.tokens.tolist()

    def bad(self) -> list[Group]:
        """Whose rows, or candidates, were not numbers."""
        output, step = self._output, self._step
        found: dict[Group, None] = {}
        if output.bad.any():
            rows = zip(step.rows, output.bad.tolist(), strict=True)
            found |= dict.fromkeys(branch.group for (branch, _), bad in rows if bad)
        for group, at in step.beams:
            if np.isnan(output.beam_logprobs[at : at + len(group.branches)]).any():
                found[group] = None
        return list(found)

    def scores(self) -> None:
        """Prompts' log-probabilities, as far as this step found them."""
        output, at = self._output, 0
        for group, count in self._step.scores:
            end, most = at + count, group.request.prompt_logprobs or 0
            group.scores += zip(
                output.score_logprobs[at:end].tolist(),
                output.score_ranks[at:end].tolist(),
                _rivals(output.score_top_tokens[at:end], output.score_top_logprobs[at:end], most),
                strict=True,
            )
            at = end

    def samples(self) -> list[Branch]:
        """Give out what was drawn; the branches that this ends."""
        ended = []
        for branch, at, guess in self._step.samples:
            group = branch.group
            if group.over or branch.finish is not None:
                continue  # a stop was found late
            count = 1 + (self._agreeing(at, guess) if guess else 0)
            choice = self._outbox.choice(group, branch.index)
            count = self._give(branch, choice, at, count)
            if group.request.logprobs is not None:
                self._logprobs(choice, at, at + count, group.request.logprobs)
            if group.draft:
                self._learn(branch, count, guess)
            if choice.finish is not None:
                branch.finish = choice.finish
                ended.append(branch)
        return ended

    def _agreeing(self, at: int, guess: list[int]) -> int:
        """How many guesses are what was drawn at their place."""
        drawn = self._tokens[at : at + len(guess)]
        pairs = zip(guess, drawn, strict=True)
        return next((i for i, (one, other) in enumerate(pairs) if one != other), len(guess))

    def _give(self, branch: Branch, choice: Choice, at: int, count: int) -> int:
        """Append tokens until one of them ends the branch; how many were given."""
        request, text = branch.group.request, branch.text
        said = choice.text
        given = 0
        for token in self._tokens[at : at + count]:
            branch.output.append(token)
            choice.tokens.append(token)
            given += 1
            if token in branch.group.stops:
                if _shown(request, token):
                    said += text.push(token)
                choice.finish, choice.stop = "stop", token
            else:
                said += text.push(token)
                if text.stopped is not None:
                    choice.finish, choice.stop = "stop", text.stopped
                elif len(branch.output) == request.max_tokens:
                    choice.finish = "length"
            if choice.finish is not None:
                said += text.finish()
                break
            if branch.mask is not None:
                branch.mask.push(token)
        choice.text = said
        self._stats.output_tokens += given
        return given

    def _logprobs(self, choice: Choice, at: int, end: int, most: int) -> None:
        output = self._output
        choice.logprobs += output.logprobs[at:end].tolist()
        choice.ranks += output.ranks[at:end].tolist()
        choice.top += _rivals(output.top_tokens[at:end], output.top_logprobs[at:end], most)

    def _learn(self, branch: Branch, count: int, guess: list[int]) -> None:
        """What the guesses were good for; the branch is as long as what was given."""
        if guess:
            self._stats.drafted += len(guess)
            self._stats.accepted += count - 1
            branch.guesses = min(branch.group.draft, 2 * count - 1)
        if branch.lookup is not None:
            for token in branch.output[-count:]:
                branch.lookup.push(token)
        branch.length = len(branch.group.prompt) + len(branch.output)
        branch.computed = branch.length - 1

    def beams(self) -> list[tuple[Group, Grown]]:
        """Step the searches, and give out what is certain now."""
        stepped = []
        for group, at in self._step.beams:
            if group.over or group.beams is None:
                continue
            end = at + len(group.branches)
            group.rows += len(group.branches)
            strings = group.stopping if group.request.stop else None
            grown = group.beams.advance(
                self._output.beam_tokens[at:end, : group.beams.candidates],
                self._output.beam_logprobs[at:end, : group.beams.candidates],
                strings,
            )
            stepped.append((group, grown))
            self._tell(group, grown)
        return stepped

    def _tell(self, group: Group, grown: Grown) -> None:
        assert group.beams is not None
        if grown.tree:
            self._outbox.event(group).tree = grown.tree
        if grown.fixed:
            self._speak(group, self._outbox.choice(group, 0), grown.fixed, group.text)
        if group.beams.done:
            for index, answer in enumerate(group.beams.answers):
                self._answer(group, index, answer)

    def _answer(self, group: Group, index: int, answer: Ending) -> None:
        """A finished hypothesis, or what was not told of the first one yet."""
        choice = self._outbox.choice(group, index)
        text = group.blank.fork() if index else group.text
        self._speak(group, choice, path(answer.node, 0 if index else group.given), text)
        choice.text += text.finish()
        choice.finish = "length" if answer.stop is None else "stop"
        choice.stop, choice.score = answer.stop, answer.score
        choice.cumulative_logprob = answer.node.sum

    def _speak(self, group: Group, choice: Choice, nodes: list[Node], text: Text) -> None:
        request = group.request
        for node in nodes:
            choice.tokens.append(node.token)
            if node.token not in group.stops or _shown(request, node.token):
                choice.text += text.push(node.token)
            if request.logprobs is not None:
                choice.logprobs.append(node.logprob)
                choice.ranks.append(node.rank)
                choice.top.append(list(node.rivals[: request.logprobs]))
        self._stats.output_tokens += len(nodes)
        if not choice.index:
            group.given += len(nodes)


def _shown(request: Request, token: int) -> bool:
    """Whether a token that ends the text belongs to it."""
    return request.include_stop and token not in request.eos


def _rivals(tokens: Ints, logprobs: Floats, most: int) -> list[Rivals]:
    """[count, top] arrays as a list of the `most` best a token."""
    rows = zip(tokens[:, :most].tolist(), logprobs[:, :most].tolist(), strict=True)
    return [list(zip(ids, chances, strict=True)) for ids, chances in rows]
