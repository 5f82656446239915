"""Every knob of a run, on one page; `mlray/configuration.py` fills it from a YAML file and the command line."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigError(Exception):
    """A configuration that cannot run; the message says what to change. Jobs exit with 2."""


class RunError(Exception):
    """A run that failed for a cause one line can name. Jobs exit with 1."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Source(_Section):
    """One place that text comes from."""

    uri: str
    """A file or folder, local or `s3://bucket/prefix`, or `hf://name[:config[:split]]` for `datasets`."""
    files: str | None = None
    """Pattern of the files that are meant below a folder, such as `*/train.conllu`."""
    format: Literal["auto", "parquet", "jsonl", "text", "csv", "tsv", "conll", "squad", "file"] = "auto"
    """`auto` goes by the file name; `.gz` and `.zst` are read through, but for parquet. `squad`: a question and the
    sentences of its context; `file`: a whole file is one document (program code)."""
    pair_uri: str | None = None
    """A text file whose lines translate those of `uri`, one by one; `language` is then a tag such as `en-de`."""
    text: str | tuple[str, ...] = "text"
    """Column (or columns, joined by a line break) that hold the text; in JSON `text.de` is the key `de` inside `text`,
    and `events.*.id` a list of the keys `id` in the list `events`; in CoNLL files a number from 0 or the name of a
    `# name = value` line; ignored for plain text files."""
    session: str | None = None
    """Column of a CSV or TSV file, such as a customer: its rows in a line with one value are one record, whose text is
    their texts, such as products, with a space between; other columns are those of the first."""
    last_is_pair: bool = False
    """The last item of a session is `pair`, and no part of `text`: what tests ask for, and training does not see."""
    query: str | None = None
    """Column with what the customer of a session has searched for; its words are read before the items."""
    pair: str | None = None
    """Column of what belongs to `text`: translation, label, or tags of its words; in text files any: pairs by tabs."""
    negatives: str | None = None
    """Column (a list, or lines of a text) with texts that must not be taken for `pair`; `others` in `squad`."""
    item: str | None = None
    """Column with what a pair is about, such as a product's id: rows that share it are no negatives of each other."""
    language: str = "filename"
    """`column:<name>`, `partition[:<key>]` (hive), `folder`, `filename` (`de.txt.gz`), or a fixed tag such as `de`."""
    part: tuple[Probability, Probability] = (0.0, 1.0)
    """Only the rows whose text's hash lies in this share: train on (0.1, 1), test on (0, 0.1) of the same files."""
    rows: tuple[NonNegativeInt, PositiveInt] | None = None
    """Only these rows of a CSV, TSV or CoNLL file, from 0 on, the second not included: where one holds two sets."""
    part_by: str | None = None
    """Column whose hash decides instead, such as an id that translations share; `id` in `squad`, `pair` in lines."""
    label_map: str | None = None
    """`uri:from:to`: a CSV or TSV file whose column `from` holds the labels and `to` the names to use for them."""
    task: str | None = None
    """Which of `objective.tasks` the rows belong to (`objective.name=multitask`)."""


class Run(_Section):
    """Name, place and seed of a run."""

    name: Annotated[str, Field(pattern=r"^[^/.][^/]*$")] = "pretrain"
    """Folder below `storage_uri`; a run with the same name resumes."""
    storage_uri: str = "runs"
    """Local folder or `s3://bucket/prefix`; with several nodes it must be reachable from all of them."""
    seed: int = Field(0, ge=0)


class Storage(_Section):
    """How S3 is reached; keys come from the environment or the instance role, never from here."""

    endpoint_url: str | None = None
    """S3 endpoint; empty means AWS (or `AWS_ENDPOINT_URL`)."""
    region: str = "us-east-1"
    timeout_s: float = Field(10.0, gt=0)
    """Seconds to wait for a connection or for the next bytes; three attempts are made."""


class Corpus(_Section):
    """What is read, how languages are mixed, and how rows are packed."""

    sources: tuple[Source, ...] = ()
    alpha: Probability = 0.3
    """Temperature of the mixture: a language with n rows is drawn with p ~ n^alpha."""
    batches: Literal["mixed", "language", "source"] = "mixed"
    """Of pairs: each batch is of one language (pair), or of one of `sources`, so that all negatives are too; what fills
    none in a window is mixed."""
    task_alpha: Probability = 0.5
    """The same over the tasks of a multi-task run; `alpha` then mixes the languages inside each."""
    curriculum: Literal["none", "length", "language"] = "none"
    """In the first windows, if `batches=mixed`: short pieces first, or the languages with most pieces in the window."""
    curriculum_windows: int = Field(1, ge=1)
    languages: tuple[str, ...] = ()
    """Languages that must be there, else the job stops before it costs anything; all that are found are used."""
    window_rows: int = Field(8192, ge=16)
    """Documents that are shuffled and packed together; files in the order of their labels want all of theirs in one."""
    sequence_length: int = Field(128, ge=8)
    """Tokens of a packed row."""
    without_tests: bool = False
    """Refuse training rows that hold a text of `evaluation.sources`, whatever its case and punctuation."""
    validation_rows: int = Field(200, ge=0)
    """Documents held out for each language, at most a tenth of them."""
    max_chars: int = Field(1_000_000, ge=1)
    """A longer record is quarantined."""
    num_readers: int = Field(1, ge=1)
    """Actors that read windows; one feeds about fifty tokenising cores."""
    max_tokenizers: int = Field(1024, ge=1)
    """Actors that tokenise and pack, at most; as many start as CPUs are free and the workers can use."""
    read_cpus: float = Field(0.1, ge=0)
    tokenize_cpus: float = Field(0.5, gt=0)


class Tokenizer(_Section):
    """A tokenizer that is loaded, or trained on the mixture."""

    path: str | None = None
    """Folder, `s3://` prefix or hub name; empty means: train one."""
    algorithm: Literal["unigram", "bpe", "byte_bpe", "items"] = "unigram"
    """`byte_bpe` (GPT-2) has no unknown characters and keeps white space as it is, as program code needs; `items`: what
    stands between spaces, such as the ids of products, the most frequent `vocab_size` of the whole corpus."""
    vocab_size: int = Field(16_000, ge=64)
    train_rows: int = Field(200_000, ge=1)
    """Documents of the mixture that training sees."""
    character_coverage: Annotated[float, Field(gt=0, le=1)] = 0.9995
    """Share of all characters that the vocabulary covers; rarer ones become unknown."""


class Model(_Section):
    """A model, built small from these numbers or loaded from `path`."""

    family: Literal["bert", "xlm-roberta", "modernbert", "m2m_100", "mbart", "gpt2", "llama", "qwen2"] = (
        "xlm-roberta"
    )
    """`translation`, `denoising`: m2m_100, mbart; `causal`, `next_item`: the last three; all else: the first three."""
    path: str | None = None
    """Folder, `s3://` prefix or hub name of a checkpoint of the family; the sizes below are then its own."""
    hidden_size: int = Field(256, ge=8)
    num_layers: int = Field(4, ge=0)
    """Of the encoder; an encoder-decoder has as many in its decoder. 0: vectors of texts are means of embeddings."""
    num_heads: int = Field(4, ge=1)
    intermediate_size: int = Field(1024, ge=8)
    max_positions: int = Field(512, ge=8)
    dropout: Probability | None = None
    """None: 0.1 in a fresh model, and a loaded one keeps its own."""
    attention_dropout: Probability | None = None
    """Of attention weights; None: as `dropout`. On a CPU it costs two fifths of a step."""
    token_dropout: Probability = 0.0
    """Share of the tokens that a model with a head for labels reads as `<mask>` while it learns."""

    @property
    def hidden_dropout(self) -> float:
        """Dropout of a fresh model."""
        return 0.1 if self.dropout is None else self.dropout

    @property
    def weights_dropout(self) -> float:
        """Dropout of a fresh model's attention weights."""
        return self.hidden_dropout if self.attention_dropout is None else self.attention_dropout


class ObjectiveTask(_Section):
    """One head of a multi-task run."""

    name: Annotated[str, Field(pattern=r"^[^:\s]+$")]
    objective: Literal["tagging", "classification", "answer"]
    weight: float = Field(1.0, gt=0)
    """Of each prediction: a tagged sentence of ten words counts ten times as much as a text with one label."""


class Objective(_Section):
    """What is learnt.

    `masked` language modelling (BERT; with pairs XLM's TLM), `causal` (GPT), `denoising` (mBART), `translation`,
    `tagging` of words, `classification` of texts, `answer`: which sentence answers, `multitask`: several of these,
    `contrastive`: texts that belong together have vectors that lie together, `distillation`: as a teacher's lie,
    `next_item`: what a customer looks at or buys next.
    """

    name: Literal[
        "masked",
        "causal",
        "denoising",
        "translation",
        "tagging",
        "classification",
        "answer",
        "multitask",
        "contrastive",
        "distillation",
        "next_item",
    ] = "masked"
    tasks: tuple[ObjectiveTask, ...] = ()
    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    whole_word: bool = False
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of translation and denoising (Szegedy et al. 2016): the share of a target's weight that all tokens divide."""
    noise_rate: Annotated[float, Field(gt=0, lt=1)] = 0.35
    """Share of the tokens that `denoising` hides in spans of Poisson lengths; it also shuffles sentences."""
    span_length: float = Field(3.5, ge=0.1)
    permute_sentences: bool = True

    @property
    def heads(self) -> dict[str, ObjectiveTask]:
        """The tasks by name."""
        return {task.name: task for task in self.tasks}


class Contrastive(_Section):
    """The loss of `contrastive`: InfoNCE over pairs (translations, queries and products, questions and answers)."""

    temperature: float = Field(0.05, gt=0)
    learn_temperature: bool = False
    margin: float = Field(0.0, ge=0)
    """The right text must be so much nearer (cosine) than the others."""
    symmetric: bool = True
    """The text is also looked for from what belongs to it."""
    negatives: Literal["targets", "all"] = "targets"
    """`all` also tells a text from those of its own side, and so of its own language."""
    hard_weight: float = Field(1.0, gt=0)
    """A hard negative counts as so many others."""
    language_quota: int = Field(0, ge=0)
    """The negatives of one language but the query's count as so many at most; 0: each counts."""
    dimensions: tuple[PositiveInt, ...] = ()
    """Prefixes of the vector that shall serve alone (Matryoshka), each shorter than it."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    cache: Literal["auto", "always", "never"] = "auto"
    """Whether a batch of several micro-batches is read twice (GradCache): `auto` does so with what does not fit."""

    @model_validator(mode="after")
    def _is_learnable(self) -> Contrastive:
        if self.learn_temperature and self.temperature < 0.01:
            raise ValueError(
                "a temperature that is learnt starts at 0.01 or above, the lowest that it may reach"
            )
        return self


class Distillation(_Section):
    """Whom the student of `distillation` learns from: an encoder that is good in one language."""

    teacher: str | None = None
    """Folder or `s3://` prefix of an encoder."""
    language: str = "en"
    """Of the half of each pair that the teacher reads; the student learns to give both halves its vector."""
    loss: Literal["mse", "similarity"] = "mse"
    """`similarity` only matches how alike texts are, and so takes a teacher with another number of dimensions."""


class Recommendation(_Section):
    """The catalogue of `next_item`, whose languages are the markets."""

    candidates: Literal["batch", "all"] = "batch"
    """What the right item is told from: the other right ones of its micro-batch (sampled softmax), or the catalogue."""
    vectors: str | None = None
    """Parquet file of `jobs/embed.py` with vectors of the items' texts, of which an item is made beside its id, so that
    one that nobody has bought has its place; of several texts of an item the mean. A run resumes on its own copy."""


class Adapter(_Section):
    """What is trained instead of the whole model."""

    kind: Literal["none", "lora", "dora", "ia3"] = "none"
    rank: int = Field(8, ge=1)
    """Of LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), scale alpha / rank; IA3 has no rank, alpha or dropout."""
    alpha: float = Field(16.0, gt=0)
    dropout: Probability = 0.0
    targets: tuple[str, ...] = ()
    """Names of the linear layers that are adapted; empty means all (of IA3: keys, values, feed-forward)."""
    language_path: str | None = None
    """A trained language adapter that lies below and stays as it is."""
    path: str | None = None
    """A trained adapter on `model.path`, for evaluation."""


class Evaluation(_Section):
    """What a model is judged on, and how it writes."""

    sources: tuple[Source, ...] = ()
    """Test sets, mapped as `corpus.sources` are."""
    max_bad_rows: int = Field(0, ge=0)
    """Rows that cannot be scored and may be left out; the report names them. One more ends the job."""
    max_rows: int = Field(0, ge=0)
    """Of each language so many at most, those with the smallest hashes (of `part_by`, else the text); 0: all."""
    negatives: int = Field(0, ge=0)
    """Items of the market's test set that the right one is ranked with, drawn without those of the session; 0: all."""
    unknown_labels: Literal["error", "wrong"] = "error"
    """A label in a test set that the training did not know ends the job, or counts as one that nobody can find."""
    num_beams: int = Field(4, ge=1)
    """1 is greedy."""
    temperature: float = Field(0.0, ge=0)
    """Above 0 the next token is drawn, with `run.seed`, and not searched."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the probability that the drawn tokens come from."""
    max_new_tokens: int = Field(128, ge=1)
    batch_tokens: int = Field(4096, ge=16)
    """Tokens of source text that are read together, padding included."""
    resamples: int = Field(1000, ge=2)
    """Of the bootstrap behind each interval (95 %)."""


class Train(_Section):
    """Optimisation, the DeepSpeed engine, and how often things happen (in steps)."""

    steps: int = Field(1000, ge=1)
    global_batch_size: int = Field(64, ge=1)
    """Packed rows that one optimiser step sees, over all workers."""
    micro_batch_size: int = Field(16, ge=1)
    """Packed rows of one forward pass on one worker."""
    lr: float = Field(5e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(50, ge=0)
    min_lr_ratio: Probability = 0.1
    weight_decay: float = Field(0.01, ge=0)
    """Not applied to biases and norms."""
    adam_betas: tuple[float, float] = (0.9, 0.98)
    adam_eps: float = Field(1e-6, gt=0)
    gradient_clipping: float = Field(1.0, ge=0)
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: bool = False
    """Keep optimiser state in host memory (ZeRO-1 and up)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` takes bf16 where the hardware computes in it."""
    activation_checkpointing: bool = False
    freeze_layers: int = Field(0, ge=0)
    """The first n layers (of an encoder-decoder: of both stacks) stay as they are."""
    freeze_embeddings: bool = False
    validate_every: int = Field(100, ge=1)
    checkpoint_every: int = Field(100, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(10, ge=1)
    early_stopping: Annotated[str, Field(pattern=r"^.+\.(loss|accuracy|bits_per_char)$")] | None = None
    """`<language>.<metric>` or `macro.<metric>`; metric: loss, accuracy, or where text is predicted bits_per_char."""
    patience: int = Field(3, ge=1)
    """Validations without improvement before the run stops."""
    resume: bool = True
    """Continue from the newest good checkpoint of the run folder."""


class Sweep(_Section):
    """A search over settings (Ray Tune), and the objective that decides it: macro - gap_weight * (macro - worst)."""

    space: dict[str, dict[str, list[Any]]] = {}
    """Key of this page -> `{choice: [...]}`, or `uniform`, `loguniform`, `integer` and `[low, high]`."""
    algorithm: Literal["random", "grid", "tpe", "pareto", "pbt"] = "random"
    """`tpe` is Optuna's; `pareto` is too, with mean and worst language as two objectives."""
    early_stopping: bool = True
    """Stop what is behind the others at the same step (ASHA); of `random`, `grid` and `tpe`."""
    reduction_factor: int = Field(3, ge=2)
    """ASHA keeps one of so many at each rung."""
    grace_steps: int = Field(100, ge=1)
    """No trial is stopped, or cloned from another, before."""
    num_trials: int = Field(8, ge=1)
    max_concurrent: int = Field(1, ge=1)
    metric: Literal["accuracy", "loss"] = "accuracy"
    """Of the validation, per language."""
    gap_weight: float = Field(0.5, ge=0)
    floors: dict[str, float] = {}
    """Language -> value of the metric; a trial that is below it from `grace_steps` on is stopped, and cannot win."""
    min_rows: int = Field(20, ge=1)
    """Held-out rows that each language must have."""
    mlflow_uri: str | None = None
    """Where MLflow also keeps the trials, such as `sqlite:///mlflow.db`; needs the extra `mlflow`."""


class Release(_Section):
    """Where bundles are kept, and what the gate lets a challenger cost; in points of the metric that decides."""

    registry_uri: str = "registry"
    """Local folder or `s3://bucket/prefix`."""
    min_gain: float = 0.0
    """The mean over the languages must gain so much on every task that has changed; below 0 it may lose."""
    tolerance: float = Field(1.0, ge=0)
    """No language may lie further below the best that a champion has had in it on the same rows."""
    tolerances: dict[str, Annotated[float, Field(ge=0)]] = {}
    """The same for single languages or directions."""
    confirmed_only: bool = False
    """A loss beyond the tolerance that was tested counts only where the paired test tells it from chance."""
    significance: Annotated[float, Field(gt=0, lt=1)] = 0.05


class Serving(_Section):
    """The HTTP application over the champion of `release.registry_uri`."""

    host: str = "127.0.0.1"
    """Beyond this machine only with `keys_uri`."""
    port: int = Field(8000, ge=0, le=65535)
    keys_uri: str | None = None
    """File of API keys, one JSON object a line; `python -m serve_app.keys` makes one."""
    language: str = "en"
    """Of a request that neither says nor shows its own."""
    confidence: float = Field(0.6, ge=-1, le=1)
    """Cosine similarity below which customer service hands over to a person."""
    grounded: Probability = 0.5
    """Share of the words of a written answer that its source holds; with less, that is told as it is."""
    pivot: str = "en"
    """Language through which a translation goes where the direct direction is weak or was never judged."""
    weak: float = Field(30.0, ge=0, le=100)
    """chrF below which a direction is weak."""
    canary: Probability = 0.0
    """Share of the customers (header `x-customer-id`) whom the challenger answers, if it has an index."""
    shadow: Probability = 0.0
    """Share of the other requests that the challenger also answers, unseen."""
    agreement: Probability = 0.3
    """Of the champion's first results that the challenger must find; where it finds less, the champion answers."""
    watch_s: float = Field(5.0, gt=0)
    """Between two looks at the registry for a new champion, and at the keys."""
    timeout_s: float = Field(10.0, gt=0)
    """A request that takes longer is answered with 503."""
    max_body_bytes: PositiveInt = 1 << 20
    max_texts: PositiveInt = 256
    """Of one request."""
    max_chars: PositiveInt = 8192
    """Of one text."""
    batch_tokens: PositiveInt = 4096
    """Of one forward pass."""
    adapters: PositiveInt = 16
    """Of markets, in memory of a replica; others are loaded when they are asked for."""
    pinned: tuple[str, ...] = ()
    """Markets whose adapters are never forgotten."""
    queued_tokens: PositiveInt = 65536
    """Of one language that may wait in a replica; beyond it a request is answered with 429."""
    num_replicas: PositiveInt = 1
    """Of the models."""
    cpus_per_replica: float = Field(1.0, gt=0)
    gpus_per_replica: float = Field(0.0, ge=0)


class Cluster(_Section):
    """What the run asks of Ray."""

    address: str | None = None
    """Ray address; empty means the cluster of this job, or a local one."""
    num_workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(0.5, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    threads_per_worker: int = Field(1, ge=1)
    """Threads of torch in a worker on CPU."""
    max_failures: int = Field(3, ge=0)
    """Restarts after a lost worker, each from the newest good checkpoint."""
    wait_s: float = Field(0.0, ge=0)
    """Seconds to wait for the nodes of an autoscaling cluster before workers count as impossible to place."""


class RunConfig(_Section):
    """The whole configuration; functions take the section they need."""

    run: Run = Run()
    storage: Storage = Storage()
    corpus: Corpus = Corpus()
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    objective: Objective = Objective()
    contrastive: Contrastive = Contrastive()
    distillation: Distillation = Distillation()
    recommendation: Recommendation = Recommendation()
    adapter: Adapter = Adapter()
    evaluation: Evaluation = Evaluation()
    train: Train = Train()
    sweep: Sweep = Sweep()
    release: Release = Release()
    serving: Serving = Serving()
    cluster: Cluster = Cluster()

    @property
    def gradient_accumulation_steps(self) -> int:
        """Forward passes of one worker in one optimiser step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.cluster.num_workers)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
