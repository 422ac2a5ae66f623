"""Engines that answer from a script or at random, for tests of control flow only."""

import asyncio

import numpy as np

from agentark_jax.engines.base import Request
from agentark_jax.errors import AgentArkError
from agentark_jax.generation import Generation
from agentark_jax.records import Completion


class Killed(Exception):
    """What ends the process, as far as a protocol can tell."""


class ScriptedEngine:
    """Answers the text that `script(prompt text, sampling)` gives, or a text with the log-probability of each token.

    `fails` says whether the engine fails: of a prompt text and the call's number (from 0). `kill_at` is the call that
    ends the run.
    """

    text_only = False

    def __init__(self, form, script, fails=lambda prompt, call: False, kill_at=None, model="scripted"):
        self.model, self.weights = model, "w0"
        self.form, self.script, self.fails, self.kill_at = form, script, fails, kill_at
        self.prompts: list[str] = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        pass

    async def generate(self, request: Request) -> Completion:
        call, prompt = len(self.prompts), self.form.tokenizer.decode(request.prompt_ids.tolist())
        self.prompts.append(prompt)
        await asyncio.sleep(0)
        if call == self.kill_at:
            raise Killed
        if self.fails(prompt, call):
            raise AgentArkError("the server went away")
        said = self.script(prompt, request.sampling)
        text, logprob = said if isinstance(said, tuple) else (said, -0.5)
        ids = np.asarray(self.form.response(text), np.int32)
        return Completion(ids, np.full(len(ids), logprob, np.float32), text, "stop", len(request.prompt_ids), 0, 0.1)


class ScriptedGeneration(Generation):
    """Whoever has a seat, one engine answers."""

    def __init__(self, engine, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.scripted = engine

    def engine(self, seat, context):
        return self.scripted


class BabblingEngine:
    """Answers with random ordinary tokens that no text would encode to, as the request's seed says."""

    text_only = False

    def __init__(self, form):
        self.model, self.weights, self.form = "babbling", "w0", form
        self.requests: list[Request] = []

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        random = np.random.default_rng(request.sampling.seed)
        ids = random.choice(self.form.tokenizer.ordinary_ids, random.integers(1, 12))
        ids = np.asarray([*ids, self.form.stop_ids[-1]], np.int32)
        text = self.form.tokenizer.decode(ids.tolist())
        return Completion(ids, np.full(len(ids), -0.5, np.float32), text, "stop", len(request.prompt_ids), 0, 0.1)
