"""From the tokens section of a config to the task samples of training, evaluation and the golden set."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen3_vlm.config import OptimConfig, RunConfig, TaskConfig, TokenDataConfig
from qwen3_vlm.data.collate import Batch
from qwen3_vlm.data.encode import SkippedRecord
from qwen3_vlm.data.loader import ordered_loader
from qwen3_vlm.data.shard_dataset import read_dataset
from qwen3_vlm.data.shards import open_shards
from qwen3_vlm.data.shuffle import Permutation
from qwen3_vlm.data.task_mixture import TaskMixture, TaskSample, TaskShare
from qwen3_vlm.data.texts import Texts
from qwen3_vlm.data.token_batches import TokenBatches, TokenCollator, TokenRecords, cut_micro_batches
from qwen3_vlm.errors import DataError, RecordError
from qwen3_vlm.fingerprint import fingerprint_dataset
from qwen3_vlm.tokenization.sequences import TEXT, DropCounter, sequence_format, sequence_lengths, task_names
from qwen3_vlm.tokenization.text import LosslessText
from qwen3_vlm.tokenization.token_space import MODALITIES, TokenSpace
from qwen3_vlm.train.step_plan import MixtureSteps

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenSource:
    """The data of a run over tokens, opened."""

    config: TokenDataConfig
    seed: int
    token_space: TokenSpace
    train: TokenRecords
    eval: TokenRecords
    shares: dict[str, TaskShare]  # training records of each task
    held_out: dict[str, Indices]  # held-out records of each task, at most `eval_max`, in a fixed random order
    drops: DropCounter
    fingerprint: str
    texts: Texts | None = None
    text_share: float = 0.0
    mark_text: bool = False
    text_weight: float = 1.0  # of the texts' losses

    @property
    def num_train(self) -> int:
        """(record, task) pairs to train on."""
        return sum(len(share.indices) for share in self.shares.values())

    @property
    def longest_sound(self) -> int:
        """Frames of the longest sound to train on, 0 where there is none."""
        audio = self.token_space.audio
        longest = self.train.lengths[:, MODALITIES.index("audio")].max(initial=0)
        return int(longest) // audio.num_codebooks if audio else 0

    @property
    def longest_sequence(self) -> int:
        """Ids of the longest sequence of any task, to train on or held out, or of the longest text."""
        sides = ((self.train, {name: share.indices for name, share in self.shares.items()}), (self.eval, self.held_out))
        lengths = (
            sequence_lengths(name, records.lengths[indices]).max(initial=0)
            for records, chosen in sides
            for name, indices in chosen.items()
        )
        texts = 0 if self.texts is None else self.texts.lengths.max()
        return int(max(texts, *lengths))

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.shares)

    def counts(self) -> dict[str, Any]:
        """Samples of each task, and what was left out."""
        texts = {} if self.texts is None else {"text_samples": len(self.texts.usable)}
        return {
            **texts,
            "train_samples": self.num_train,
            "eval_samples": sum(map(len, self.held_out.values())),
            "tasks": {name: [len(share.indices), len(self.held_out[name])] for name, share in self.shares.items()},
            "dropped": self.drops.to_dict(),
        }

    def unusable(self) -> list[SkippedRecord]:
        """Texts; of records none is known before it is read, and what does not fit a task is in `drops`."""
        return self.texts.unusable if self.texts else []

    def plan(self, optim: OptimConfig, *, ranks: int, rank: int) -> MixtureSteps:
        """The steps of one rank."""
        texts = {} if self.texts is None else {TEXT: TaskShare(self.texts.usable, fixed=self.text_share)}
        mixture = TaskMixture(
            {**self.shares, **texts},
            samples=optim.batch_size * optim.accumulation * ranks,
            seed=self.seed,
            epochs=optim.epochs,
            steps=optim.max_steps,
        )

        def cut(samples: Sequence[TaskSample]) -> list[tuple[TaskSample, ...]]:
            """A step's samples → micro-batches."""
            return cut_micro_batches(self.train, samples, optim.batch_size, self.texts)

        return MixtureSteps(mixture, cut, ranks=ranks, rank=rank)

    def train_batches(self, micro_batches: Sequence[Sequence[TaskSample]]) -> Iterator[Batch]:
        """These micro-batches, in order, read by worker processes."""
        settings = {name: self.config.tasks[_section(self.config, name)] for name in self.tasks}
        weights = {name: task.loss_weight for name, task in settings.items()} | {TEXT: self.text_weight}
        plain = all(weight == 1.0 for weight in weights.values())
        return self._iterate(
            self.train,
            TokenCollator(self.token_space, None if plain else weights, mark_text=self.mark_text),
            micro_batches,
            {name: task.source_dropout for name, task in settings.items()},
        )

    def eval_batches(self, task: str, indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        """Held-out records as one task, in batches."""
        samples = [TaskSample(task, int(index), 0) for index in indices]
        batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        return self._iterate(self.eval, TokenCollator(self.token_space), batches)

    def task_config(self, task: str) -> TaskConfig:
        """The settings of a task, its own or its family's."""
        return self.config.tasks[_section(self.config, task)]

    def eval_records(self, task: str) -> Iterator[tuple[str, Any]]:
        """(id, global ids by modality) of the held-out records of a task; a damaged one is passed over."""
        for index in self.held_out[task]:
            try:
                record = self.eval[int(index)]
            except RecordError:
                continue
            yield record.id, record.ids

    def _iterate(
        self,
        records: TokenRecords,
        collator: TokenCollator,
        batches: Sequence[Sequence[TaskSample]],
        source_dropout: Mapping[str, float] | None = None,
    ) -> Iterator[Batch]:
        dataset = TokenBatches(
            records,
            self.token_space,
            collator,
            batches,
            max_seq_len=self.config.max_seq_len,
            noise_seed=self.seed,
            source_dropout=source_dropout,
            texts=self.texts,
        )
        return iter(ordered_loader(dataset, self.config.num_workers))


def check_token_folders(config: TokenDataConfig) -> TokenSpace:
    """The one token space of all folders, read before anything large is.

    Raises:
        DataError: no folder is named, or one is no complete data set.
        TokenSpaceError: they do not share one token space, with a line per difference.
        TokenError: there is no such task.
    """
    if not config.folders:
        raise DataError("The config names no training data: set tokens.folders to what `data tokenize` wrote.")
    task_names(config.tasks)
    spaces: list[TokenSpace] = []
    seen: dict[str, str] = {}
    for folder in config.folders:
        earlier = seen.setdefault(read_dataset(folder).sha256, folder)
        if earlier != folder or config.folders.count(folder) > 1:
            raise DataError(
                f"tokens.folders has the same data twice ({earlier} and {folder}): its held-out records would count "
                "twice as evidence. Give a task more weight, or more epochs, instead."
            )
        spaces.append(TokenSpace.load(folder))
        spaces[0].require_same(spaces[-1], f"The data set {folder}")
    return spaces[0]


def open_tokens(
    config: RunConfig, token_space: TokenSpace, *, tokenizer: Any = None, verify: bool = True
) -> TokenSource:
    """Open the shards, and find out which records serve which task; and the texts that are mixed in.

    Args:
        tokenizer: of the base, for texts.
        verify: hash the tars, about a second per GB; one process of a machine is enough.

    Raises:
        DataError: a data set is damaged, was never audited, or nothing is left of a task.
        TokenSpaceError: a data set has another token space than `token_space`.
    """
    settings = config.tokens

    def records(split: str) -> TokenRecords:
        options: Any = {"split": split, "allow_unaudited": settings.allow_unaudited, "verify": verify}
        having = [folder for folder in settings.folders if split in read_dataset(folder).splits]
        return TokenRecords([open_shards(folder, token_space, **options) for folder in having])

    train, held_out, drops = records(settings.train_split), records(settings.eval_split), DropCounter()
    if not len(train):
        raise DataError(f"None of {', '.join(settings.folders)} has records in a split {settings.train_split!r}.")
    shares, chosen = {}, {}
    for name in task_names(settings.tasks):
        task = settings.tasks[_section(settings, name)]
        usable = train.usable(name, settings.max_seq_len, drops, task.folders)
        if not len(usable):
            wanted = sequence_format(name)
            raise DataError(
                f"No record of {', '.join(task.folders or settings.folders)} can be used for the task {name}: it "
                f"needs {wanted.source} and {wanted.target}, {settings.max_seq_len:,} ids at most "
                f"({drops.to_dict().get(name)})."
            )
        shares[name] = TaskShare(usable, task.weight, task.ramp_from, task.ramp_until)
        others = held_out.usable(name, settings.max_seq_len, DropCounter(), task.folders)
        order = Permutation(len(others), f"{config.seed}/held out")(np.arange(min(len(others), settings.eval_max)))
        chosen[name] = others[order]
    parts = [(str(number), str(part)) for number, part in enumerate(train.identity)]
    texts = _texts(config, token_space, tokenizer) if config.text.files else None
    parts += [("text", texts.fingerprint)] if texts else []
    return TokenSource(
        settings,
        config.seed,
        token_space,
        train,
        held_out,
        shares,
        chosen,
        drops,
        fingerprint_dataset(parts),
        texts,
        config.text.share,
        config.lora.kl_weight > 0,
        config.text.loss_weight,
    )


def _texts(config: RunConfig, token_space: TokenSpace, tokenizer: Any) -> Texts:
    text = LosslessText(tokenizer, token_space.text.vocab_size, token_space.text.name)
    texts = Texts(config.text.files, text.encode, config.tokens.max_seq_len)
    if len(texts.unusable) > config.tokens.max_bad_fraction * len(texts):
        raise DataError(
            f"{len(texts.unusable):,} of {len(texts):,} texts can't be used, more than tokens.max_bad_fraction "
            f"{config.tokens.max_bad_fraction:g}; the first: {texts.unusable[0].message}"
        )
    return texts


def _section(config: TokenDataConfig, task: str) -> str:
    """The name under which a task stands in the config: its own, or its family's ("copy" for "copy_image")."""
    return task if task in config.tasks else next(name for name in config.tasks if task in task_names([name]))


def uti_folder(config: TokenDataConfig) -> Path:
    """Where the uti.yaml of the data is."""
    return Path(config.folders[0])
