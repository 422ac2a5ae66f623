"""BERTScore (Zhang et al. 2020): how close free answers come to gold ones in the embeddings of a language model.

Each token of one text is matched with the nearest of the other by the cosine of their contextual embeddings; precision
is the mean over the answer's tokens, recall over the gold's, and the score their harmonic mean. It decides nothing: a
wrong answer to the same question comes close, too.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentark_jax.errors import AgentArkError, UsageError

NAME = "BERTScore"
_BATCH = 64  # texts, or pairs of them
_PAIRS = 1024  # whose embeddings are held at once


class BERTScore:
    """Scores answers by one model, which must be an encoder, or have one. Not rescaled, without weights of words.

    Args:
        source: a directory in Hugging Face format, from which nothing is fetched, or a hub id. Its weights are read,
            code that it has is never run.
        layer: whose embeddings count, from 1; None: of a hub id for which `bert-score` has found the one that goes best
            with people's judgement, that one, otherwise the last.

    Attributes:
        layer: that is used.

    Raises: UsageError without the package `bert-score`, for a directory that is no such model or has no such layer,
    and AgentArkError where the hub does not provide it.
    """

    def __init__(self, source: str, layer: int | None = None):
        if find_spec("bert_score") is None:
            raise UsageError("--bertscore needs the Python package bert-score; pip install -e '.[bertscore]'")
        from bert_score.utils import model2layers
        from transformers import AutoConfig, AutoModel, AutoTokenizer, logging

        path = Path(source).expanduser()
        local = path.exists() or source.startswith((".", "/", "~"))
        if local and not (path / "config.json").is_file():
            raise UsageError(f"--bertscore {source}: no directory with a config.json; give a model's, or a hub id")
        # Whatever else it may have: code of others is not run.
        asked: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
        where = str(path) if local else source
        try:
            config = AutoConfig.from_pretrained(where, **asked)
            layers = config.num_hidden_layers
            self.layer = min(model2layers.get(source, layers), layers) if layer is None else layer
            if not 1 <= self.layer <= layers:
                raise UsageError(f"--bertscore-layer {layer}: {source} has {layers}")
            self._tokenizer = AutoTokenizer.from_pretrained(where, **asked)
            # Layers above are not needed, and no word about them.
            asked |= {"num_hidden_layers": self.layer, "dtype": "float32", "output_loading_info": True}
            told = logging.get_verbosity()
            logging.set_verbosity_error()
            try:
                model, loaded = AutoModel.from_pretrained(where, **asked)
            finally:
                logging.set_verbosity(told)
            missing = sorted(name for name in loaded["missing_keys"] if "pooler" not in name)
            if missing:
                raise ValueError(f"it has no weights {missing[0]}, ...")
        except (OSError, ValueError, KeyError, AttributeError, json.JSONDecodeError) as error:
            kind = UsageError if local else AgentArkError
            raise kind(f"--bertscore {source}: cannot be loaded as a model with its tokenizer ({error})") from error
        self._model = (model.get_encoder() if config.is_encoder_decoder else model).eval()
        if self._tokenizer.model_max_length > 1_000_000:  # not said: positions less those that some give to padding
            self._tokenizer.model_max_length = getattr(config, "max_position_embeddings", 514) - 2

    def __call__(self, answers: Sequence[str], golds: Sequence[Sequence[str]]) -> list[float]:
        """The largest F1 of each answer with one of its gold answers, in [−1, 1]; 0 where there is no answer."""
        from bert_score.utils import bert_cos_score_idf

        weights: dict[int, float] = defaultdict(lambda: 1.0)
        weights |= {self._tokenizer.cls_token_id: 0.0, self._tokenizer.sep_token_id: 0.0}
        best: dict[int, float] = {}
        pairs = [
            (index, answer, gold)
            for index, (answer, others) in enumerate(zip(answers, golds, strict=True))
            for gold in others
            if answer.strip() and gold.strip()
        ]
        for start in range(0, len(pairs), _PAIRS):
            indices, said, right = map(list, zip(*pairs[start : start + _PAIRS], strict=True))
            found = bert_cos_score_idf(
                self._model, right, said, self._tokenizer, weights, batch_size=_BATCH, device="cpu"
            )
            for index, value in zip(indices, found[:, 2].tolist(), strict=True):
                best[index] = max(best.get(index, value), value)
        return [best.get(index, 0.0) for index in range(len(answers))]
