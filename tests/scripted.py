"""An engine that answers from a script, for tests of control flow only."""

import numpy as np

from agentark_jax.engines.base import Request
from agentark_jax.errors import AgentArkError
from agentark_jax.records import Completion


class ScriptedEngine:
    """Answers the text that `script(prompt text, sampling)` gives; `fail_on` calls raise (counted from 0)."""

    def __init__(self, form, script, fail_on=()):
        self.model, self.weights = "scripted", "w0"
        self.form, self.script, self.fail_on = form, script, set(fail_on)
        self.prompts: list[str] = []

    async def generate(self, request: Request) -> Completion:
        self.prompts.append(self.form.tokenizer.decode(request.prompt_ids.tolist()))
        if len(self.prompts) - 1 in self.fail_on:
            raise AgentArkError("the server went away")
        text = self.script(self.prompts[-1], request.sampling)
        ids = np.asarray(self.form.response(text), np.int32)
        return Completion(ids, np.full(len(ids), -0.5, np.float32), text, "stop", len(request.prompt_ids), 0, 0.1)
